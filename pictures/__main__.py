"""`python -m pictures`: draws every picture again."""

from pathlib import Path

from pictures.thread import PICTURES

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().text(), encoding="utf-8")
        print(f"docs/pictures/{name}.svg")
