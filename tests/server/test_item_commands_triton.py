"""hsnn items against a real Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from index_repository import write_index

from clients.items import ItemClient
from hsnn_cli.main import main
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

CSV = """item_id,category,price,country,start_time,end_time,paused,bid,note
1,4|2,2.5,IT|DE,0,2000000000,false,0.7,x
2,,,,,,,,
3,1,nan,,,,,,
4,1,2,,9,3,,,
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("repository")
    write_index(root, 1)
    with TritonServer(root, models=["hsnn_index"]) as server:
        yield server.urls.grpc


def test_upsert_delete_stats(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "items.csv"
    file.write_text(CSV)
    assert main(["items", "upsert", str(file), "--url", url, "--batch", "2"]) == 1
    said = capsys.readouterr()
    assert "upserted: 2, stale: 0; the log is at position 2" in said.out
    assert "columns that the schema does not name, not used: note" in said.out
    assert "update 3: item 3: feature 'price': got nan, expected finite float32 numbers" in said.err
    assert "update 4: item 4: attribute 'running': got [9.0, 3.0], expected from <= until" in said.err
    assert "2 of 4 updates were refused, for the reasons above; the others are done" in said.err

    assert main(["items", "delete", "--ids", "1", "--sequence", "3", "--url", url]) == 0
    assert "deleted: 0, stale: 1;" in capsys.readouterr().out
    (tmp_path / "gone.txt").write_text("1\n\n77\n")
    assert main(["items", "delete", str(tmp_path / "gone.txt"), "--url", url]) == 0
    assert "deleted: 2, stale: 0; the log is at position 4" in capsys.readouterr().out

    assert main(["items", "stats", "--json", "--url", url]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["live"], stats["deleted"], stats["position"]) == (1, 2, 4)
    assert main(["items", "stats", "--url", url]) == 0
    assert "items updated and live" in capsys.readouterr().out
    with ItemClient(url) as client:
        assert vars(client.stats()) == stats


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["delete"], "give either --ids or a file of ids"),
        (["delete", "--ids", "x"], "item id: got 'x', expected a whole number, as the schema's item ids are"),
        (
            ["delete", "nothing.txt"],
            "nothing.txt: No such file or directory; expected a file with one item id per line",
        ),
        (["upsert", "nothing.csv"], "nothing.csv: No such file or directory; expected a file of items"),
        (["upsert", "nothing.csv", "--batch", "0"], "batch: got 0, expected 1..10000 updates in one call"),
    ],
)
def test_what_the_caller_did_wrong(
    arguments: list[str], message: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["items", *arguments, "--url", url]) == 1
    assert message in capsys.readouterr().err
