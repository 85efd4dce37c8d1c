"""The web page: HTML, CSS and JavaScript modules, served as they are. No build step, nothing from elsewhere."""

from pathlib import Path

FOLDER = Path(__file__).parent
