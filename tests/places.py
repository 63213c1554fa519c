"""Where tests find what lies elsewhere: the project, files of an earlier version, real images if they are here."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MADE_BEFORE = REPOSITORY / "tests" / "acceptance" / "from_4e0b6a7"  # files that an earlier version wrote
REAL_DATA = Path(os.environ.get("FREM_SEARCH_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
