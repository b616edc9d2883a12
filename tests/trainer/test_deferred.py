"""Lightning's floor without its Trainer, and its Trainer where somebody asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import environment


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fabric_is_imported_without_what_only_the_trainer_needs() -> None:
    heavy = ("torchvision", "transformers", "lightning.pytorch")
    code = f"import sys, trainer.engine; print(*[name for name in {heavy} if name in sys.modules])"
    assert python(code).split() == []


def test_the_whole_package_is_there_for_who_asks() -> None:
    code = (
        "import trainer.engine, lightning, torchmetrics; "
        "print(lightning.Trainer.__name__, torchmetrics.Accuracy.__name__, lightning.__version__ > '2')"
    )
    assert python(code).split() == ["Trainer", "Accuracy", "True"]


@pytest.mark.parametrize(
    "statement",
    [
        "from torchmetrics.classification import MulticlassAccuracy as found",
        "from lightning.pytorch.callbacks import Callback as found",
    ],
)
def test_users_import_whatever_they_like_afterwards(statement: str) -> None:
    assert "found" in python(f"import trainer.engine; {statement}; print('found', found)")


def test_imported_objects_are_kept_from_the_collector() -> None:
    code = """
import gc, sys
from trainer.deferred import uncollected
with uncollected():
    assert not gc.isenabled()
    import xml.dom.minidom
frozen = gc.get_freeze_count()
with uncollected():
    import xml.dom.minidom
    young = [[] for _ in range(3)]
print(frozen > 1000, gc.get_freeze_count() - frozen, gc.isenabled(), any(item is young for item in gc.get_objects()))
"""
    assert python(code).split() == ["True", "0", "True", "True"]
