"""Studies, trials and their events as JSON documents, the form in which the ledger keeps them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mlmesh_training import documents
from mlmesh_training.documents import Document
from mlmesh_training.studies.study import EventBody, Study, StudyChanged, StudySpec, Trial, TrialChanged

# What a study was asked and resolved to: it may be long, and it is kept once and not with every event.
_FIXED = ("spec", "axes")


def spec_document(spec: StudySpec) -> Document:
    """A spec as plain values."""
    return cast(Document, documents._plain(spec))


def study_document(study: Study) -> Document:
    """A study as plain values."""
    return cast(Document, documents._plain(study))


def trial_document(trial: Trial) -> Document:
    """A trial as plain values."""
    return cast(Document, documents._plain(trial))


def read_study(document: Mapping[str, Any]) -> Study:
    """A study from its document. Errors: KeyError, TypeError, ValueError when it is not one."""
    return documents._read(Study, document)


def read_trial(document: Mapping[str, Any]) -> Trial:
    """A trial from its document. Errors: KeyError, TypeError, ValueError when it is not one."""
    return documents._read(Trial, document)


def body_document(body: EventBody) -> tuple[str, Document]:
    """An event's kind and its plain values; of a study only what changes."""
    match body:
        case StudyChanged(study=Study() as study):
            return "study", {name: value for name, value in study_document(study).items() if name not in _FIXED}
        case TrialChanged(trial=Trial() as trial):
            return "trial", trial_document(trial)
    raise ValueError("a change without what it changed")


def read_body(kind: str, document: Mapping[str, Any], study: Mapping[str, Any]) -> EventBody:
    """An event from its kind and document, and the document of its study as it is at any time.

    Errors: KeyError, TypeError, ValueError when it is not one.
    """
    if kind == "study":
        return StudyChanged(study=read_study({**document, **{name: study[name] for name in _FIXED}}))
    if kind == "trial":
        return TrialChanged(trial=read_trial(document))
    raise ValueError(f"no event of kind {kind!r}")
