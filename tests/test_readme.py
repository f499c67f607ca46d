"""What the README shows is what the repository has."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readmes_example_is_the_one_in_examples():
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = (ROOT / "examples" / "quickstart.py").read_text()
    assert script.partition("\n\n")[2] == code


def test_every_file_the_readme_names_exists():
    import re

    for name in re.findall(r"\]\(([\w/.]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name
