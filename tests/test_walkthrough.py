"""The walk for learners runs from its first cell to its last, on the shipped weights."""

import time
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_walkthrough_runs_in_under_a_minute_and_prints_what_it_shows():
    """Executed anew, every cell ends and prints the text that is committed with it."""
    stored = nbformat.read(DOCS / "walkthrough.ipynb", as_version=4)
    fresh = nbformat.read(DOCS / "walkthrough.ipynb", as_version=4)
    begun = time.process_time()
    client = nbclient.NotebookClient(fresh, timeout=300, resources={"metadata": {"path": DOCS}})
    client.execute()
    assert time.process_time() - begun < 60
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        if before.cell_type == "code":
            printed = [
                "".join(o.text for o in c.outputs if o.output_type == "stream")
                for c in (before, after)
            ]
            assert printed[0] == printed[1]
            assert sum(o.output_type == "display_data" for o in before.outputs) == sum(
                o.output_type == "display_data" for o in after.outputs
            )
