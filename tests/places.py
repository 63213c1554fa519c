"""Where tests find what is not theirs: the project, and the real images if this machine has them."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MADE_BEFORE = REPOSITORY / "tests" / "data"
REAL_DATA = Path(os.environ.get("FREM_SEARCH_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
