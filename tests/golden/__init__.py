"""Golden files: what the packaged recipes resolve to, so that a change of any default shows as a diff.

Regenerate with `python -m tests.golden.regenerate`, then read the diff before committing it.
"""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
