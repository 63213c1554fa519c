"""The files of trials as Optuna's artifact store, which finds a file by nothing but an id."""

import io
import re
from typing import TYPE_CHECKING, BinaryIO

import sqlalchemy as sa
from optuna.artifacts.exceptions import ArtifactNotFound

from frem_search.storage.artifacts import Artifacts
from frem_search.storage.trial_notes import shown_file
from frem_search.study.stored import artifacts_prefix

if TYPE_CHECKING:
    from frem_search.storage.database import Storage

UPLOADS = "dashboard-uploads"  # the folder of files that somebody added in the dashboard
UPLOAD_ID = re.compile(r"[0-9a-fA-F-]{1,64}")
STUDY_NAME = sa.text("""
    SELECT s.study_name FROM studies s JOIN study_user_attributes a USING (study_id)
    WHERE a.key = 'uid' AND a.value_json = :uid
""")


class StudyArtifacts:
    """Reads what trials left behind, and keeps what is added in the dashboard.

    Args:
        storage: Which tells the name of a study from its id.
        url: The URL of all studies' artifacts.
    """

    def __init__(self, storage: "Storage", url: str) -> None:
        self._storage, self._url = storage, url

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Return a file's content.

        Raises:
            ArtifactNotFound: There is no such file.
        """
        artifacts, name = self._find(artifact_id)
        content = artifacts.read(name)
        if content is None:
            message = f"{artifacts.url(name)}: no such file. Give --artifacts as the search was started with."
            raise ArtifactNotFound(message)
        return io.BytesIO(content)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store a file."""
        artifacts, name = self._find(artifact_id)
        artifacts.write(name, content_body.read())

    def remove(self, artifact_id: str) -> None:
        """Remove a file; nothing happens if there is none."""
        artifacts, name = self._find(artifact_id)
        artifacts.remove(name)

    def _find(self, artifact_id: str) -> tuple[Artifacts, str]:
        if not UPLOAD_ID.fullmatch(artifact_id):
            raise ArtifactNotFound(artifact_id)  # no path outside of the artifacts
        shown = shown_file(artifact_id)
        if shown is None:
            return Artifacts(self._url, UPLOADS), artifact_id
        with self._storage.engine.connect() as connection:
            study = connection.execute(STUDY_NAME, {"uid": f'"{shown.study_uid}"'}).scalar()
        if study is None:
            message = f"{artifact_id}: the study that this file belongs to is not in {self._storage.label} any more."
            raise ArtifactNotFound(message)
        return Artifacts(self._url, artifacts_prefix(study, shown.study_uid)), shown.name
