"""Laws of the report: says what the folders say, escapes what it is given, needs no network, same bytes each time."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from sattile import comparison, figures, metrics, reporting, schema
from sattile.errors import SattileError, UsageError
from sattile.reporting import collect
from sattile.schema import SegmentClass

NASTY = "<script>alert('1 & 2')</script> \"x\".tif"
SCENES = ("scene one, west", "scene-two", NASTY)
CLASSES = [
    {"id": 0, "name": "soil", "color": "#ddcc77"},
    {"id": 1, "name": "water", "color": "#332288"},
    {"id": 2, "name": "R&D <b>", "color": '"></style><script>'},
]


def png(height: int = 6, width: int = 9) -> bytes:
    """A picture, written by hand: the report has to take the bytes as they are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(row, row + width)) for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def record(folder: Path, command: str, **more: Any) -> None:
    value = {
        "command": command,
        "settings": {"note": NASTY, "size": 128},
        "versions": {"python": "3.11.7", "sattile": "0.1.0"},
        "inputs": [{"url": "a.tif", "size": 1, "mtime": 2}],
        "stages": [{"name": f"{command} stage", "seconds": 12.5, "pixels": 25_000_000, "mpix_per_s": 2.0}],
        "evaluated_mpix_per_s": None,
        "delivered_mpix_per_s": None,
        "peak_memory_mb": 812.0,
        "done": 2,
        "skipped": 0,
        "quarantined": 0,
        "finished": True,
    }
    write_json(folder / "_run.json", {**value, **more})


def quarantine(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    pq.write_table(pa.table(list(zip(*rows, strict=True)), schema=schema.QUARANTINE), folder / "_quarantine.parquet")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """One out folder of each command, of the contract's shape and no more."""
    at = {name: tmp_path / "work" / name for name in ("catalog", "tiles", "model", "evaluation", "mosaics")}

    record(at["catalog"], "index", quarantined=1)
    quarantine(at["catalog"], [("scenes/broken & <bad>.tif", "index", "the file ends after 10 of 20 bytes")])
    shapes = [shapely.box(10.5 + 0.1 * i, 45.2, 10.65 + 0.1 * i, 45.3) for i in range(3)]
    table = pa.table(
        {
            "scene_id": list(SCENES),
            "url": [f"scenes/{name}" for name in SCENES],
            "width": [1120, 900, 30],
            "height": [960, 700, 20],
            "bands": [["B02", "B03"]] * 3,
            "datetime": ["2024-06-14T10:10:31Z", None, "2024-07-01T10:10:31Z"],
            "gsd": [10.0, 10.0, None],
            "footprint": [shapely.to_wkb(shapes[0]), shapely.to_wkb(shapes[1]), None],
            "crs": ["EPSG:32632", "EPSG:32632", None],
            "transform": [[10.0, 0.0, 617700.0, 0.0, -10.0, 5016800.0]] * 3,
        }
    )
    pq.write_table(table, at["catalog"] / "scenes.parquet")

    record(at["tiles"], "tile", quarantined=1)
    quarantine(at["tiles"], [(f"scenes/{SCENES[1]}", "read", "a block at row 512 can't be decoded")])
    split = {"valid_pixels": 900, "labelled_pixels": 800, "class_pixels": {"0": 500, "1": 200, "2": 100}}
    statistics = {"mean": 812.5, "std": 40.25, "min": 1, "max": 9000, "percentiles": {"2": 10, "50": 800, "98": 2000}}
    for name in ("train", "val", "test"):
        (at["tiles"] / name).mkdir()
        tiles = {"scene_id": [SCENES[0]] * 2, "row": [0, 0], "col": [0, 128], "image": [b"x", b"y"]}
        pq.write_table(pa.table(tiles), at["tiles"] / name / "part-0.parquet")
    write_json(
        at["tiles"] / "dataset.json",
        {
            "format": "sattile-tiles/1",
            "bands": ["B02", "B03"],
            "dtype": "uint16",
            "size": 128,
            "stride": 128,
            "classes": CLASSES,
            "gsd": 10.0,
            "splits": {
                name: {"tiles": 2, "files": ["part-0.parquet"], "rows": [2], **split}
                for name in ("val", "test", "train")
            },
            "statistics": {"B02": statistics},
            "split_rule": {"by": "block", "buffer": 128},
            "sources": [{"scene_id": SCENES[0]}],
            "digest": "cafe",
        },
    )

    record(at["model"], "train")
    history = [
        {"epoch": 1, "loss": 1.5, "val_loss": 1.4, "val_miou": 0.31, "seconds": 8.0},
        {"epoch": 2, "loss": 0.9, "val_loss": 0.8, "val_miou": 0.6543, "seconds": 8.0},
        {"epoch": 3, "loss": 0.7, "val_loss": 0.9, "val_miou": None, "seconds": 8.0},
    ]
    write_json(at["model"] / "history.json", history)
    write_json(at["model"] / "bundle.json", {"bands": ["B02", "B03"], "classes": CLASSES, "receptive_radius": 51})

    record(at["evaluation"], "evaluate", settings={"split": "test"}, unlike={"dusk": "darker in band <1>"})
    scores = {"iou": 0.8765, "precision": 0.9, "recall": 0.95, "f1": 0.93, "pixels": 54321}
    write_json(
        at["evaluation"] / "metrics.json",
        {
            "classes": {"soil": scores, "water": None, "R&D <b>": {**scores, "iou": 0.25}},
            "miou": 0.5633,
            "accuracy": 0.9321,
            "confusion": [[90, 0, 10], [0, 0, 0], [7, 0, 13]],
            "pixels": 120,
            "scenes": {
                SCENES[0]: {"classes": {"soil": {"iou": 0.4321}}, "miou": 0.4321, "accuracy": 0.5, "pixels": 77}
            },
        },
    )
    samples = at["evaluation"] / "samples"
    samples.mkdir()
    for kind in ("image", "truth", "prediction", "errors"):
        (samples / f"0-{kind}.png").write_bytes(png())
    sample = {kind: f"0-{kind}.png" for kind in ("image", "truth", "prediction", "errors")}
    write_json(samples / "samples.json", [{"name": NASTY, **sample}])

    record(at["mosaics"], "predict", delivered_mpix_per_s=1.234, evaluated_mpix_per_s=1.5,
           unlike={"winter": "brighter in <every> band"})  # fmt: skip
    for scene_id in SCENES[:2]:
        folder = at["mosaics"] / scene_id
        assets = {"labels": {"href": "./labels.tif"}, "thumbnail": {"href": "./quick.png", "roles": ["thumbnail"]}}
        write_json(folder / f"{scene_id}.json", {"type": "Feature", "assets": assets})
        (folder / "quick.png").write_bytes(png())
    return at


class Page(HTMLParser):
    """What a browser would make of it: tags, links, text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr", "path", "use", "circle", "rect"})

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.links += [
            value for key, value in attrs if value and key in ("src", "href", "srcset", "xlink:href", "data")
        ]
        self.ids |= {named["id"]} if named.get("id") else set()
        assert not [key for key in named if key.startswith("on")]
        for color in re.findall(r"background:(.*)", named.get("style") or ""):  # data, and still a colour
            assert re.fullmatch(r"#[0-9a-f]{6}|rgba\(var\(--heat\),[.\d]+\)", color)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*folders: Path) -> str:
    return reporting.render(reporting.collect([str(folder) for folder in folders]))


def test_says_what_the_folders_say(folders: dict[str, Path]) -> None:
    text = " ".join(Page(page_of(*folders.values())).text.split())
    for said in (
        "0.563",  # mIoU
        "93.2 %",
        "0.876",  # rounded half to even: 0.8765 lies below in binary
        "neither in the labels nor in the predictions",
        "epoch 2 are kept, with a validation mIoU of 0.654",
        "1.23",  # Mpix/s delivered
        "the file ends after 10 of 20 bytes",
        "a block at row 512 can't be decoded",
        "tile: read",
        "62.5 %",  # share of soil: 500 of 800
        "35.0 %",  # confusion: 7 of 20
        "10.0 %",
        "812",  # mean of the band
        "54\u202f321",
        "2024-06-14",
        "3.11.7",
        "51 px",
        "0.432",  # of one scene
        "2 scenes were refused",
        "1 of them is unlike what the model was trained on",
        "winter: brighter in <every> band",
        "dusk: darker in band <1>",
        NASTY,
        "R&D <b>",
    ):
        assert " ".join(said.split()) in text, said


def test_a_composite_is_of_its_first_to_its_last_day_and_an_undated_scene_of_none(folders: dict[str, Path]) -> None:
    path = folders["catalog"] / "scenes.parquet"
    table = pq.read_table(path)
    for name, day in (("start_datetime", "2020-01-01T00:00:00Z"), ("end_datetime", "2020-03-31T00:00:00Z")):
        table = table.append_column(name, pa.array([None, None, day], pa.string()))
    table = table.set_column(table.column_names.index("datetime"), "datetime", pa.nulls(3, pa.string()))
    pq.write_table(table, path)
    html = page_of(folders["catalog"])
    assert re.findall(r'nowrap">([^<]*)</td><td class="n">\d+ × \d+', html) == ["–", "–", "2020-01-01 – 2020-03-31"]


def test_needs_no_network_and_runs_nothing(folders: dict[str, Path]) -> None:
    html = page_of(*folders.values())
    page = Page(html)
    assert page.links
    for link in page.links:
        assert link.startswith(("data:image/png;base64,", "#"))
    assert not {"script", "iframe", "object", "link", "base", "embed"} & set(page.tags)
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert "@import" not in html
    outside = re.findall(r"url\((?!#)[^)]*\)", html)
    assert outside == []
    assert page.tags.count("style") >= 1
    assert NASTY not in html


def test_same_bytes_whatever_the_order(folders: dict[str, Path]) -> None:
    first = page_of(*folders.values())
    assert first == page_of(*reversed(folders.values()))
    assert first == page_of(folders["catalog"].parent)
    record(folders["catalog"].parent, "run")  # as `sattile run` leaves it there: its time is that of the others
    assert first == page_of(folders["catalog"].parent)


@pytest.mark.parametrize(
    "names", [["catalog"], ["tiles"], ["model"], ["evaluation"], ["mosaics"], ["model", "mosaics"]]
)
def test_folders_that_are_not_given_are_left_out(folders: dict[str, Path], names: list[str]) -> None:
    page = Page(page_of(*(folders[name] for name in names)))
    sections = {"tiles": "data", "catalog": "data", "model": "training", "evaluation": "quality", "mosaics": "maps"}
    wanted = {sections[name] for name in names} | ({"maps"} if "evaluation" in names else set())
    assert page.ids & set(sections.values()) == wanted
    assert {"throughput", "refused", "details"} <= page.ids


def test_files_that_are_missing_or_strange_do_no_harm(folders: dict[str, Path]) -> None:
    (folders["model"] / "history.json").unlink()
    (folders["evaluation"] / "metrics.json").unlink()
    (folders["catalog"] / "scenes.parquet").unlink()
    (folders["tiles"] / "train" / "part-0.parquet").unlink()
    samples = folders["evaluation"] / "samples"
    (samples / "text.png").write_text("no picture")
    (folders["evaluation"] / "secret.png").write_bytes(png(3, 4))
    write_json(samples / "samples.json", [{"name": "a", "image": "text.png", "truth": "../secret.png", "errors": None}])
    page = Page(page_of(*folders.values()))
    assert "No training history" in page.text
    assert sum(link.startswith("data:") for link in page.links) == 2  # the quicklooks


def test_nothing_refused_is_said(folders: dict[str, Path]) -> None:
    text = Page(page_of(folders["model"], folders["mosaics"])).text
    assert "Nothing: every scene that was given was used." in text
    assert "Nothing was refused." in text


def test_refusal_of_several_commands_is_one_entry(folders: dict[str, Path]) -> None:
    row = (f"scenes/{SCENES[1]}", "read", "a block at row 512 can't be decoded")
    quarantine(folders["mosaics"], [row])
    text = Page(page_of(*folders.values())).text
    assert text.count(row[2]) == 1
    assert "tile: read, predict: read" in text


def test_report_writes_once(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "work" / "report"
    url = reporting.report([str(folders["catalog"].parent)], out=str(out))
    assert url == f"{out}/index.html"
    before = Path(url).stat()
    assert reporting.report([str(folders["catalog"].parent)], out=str(out)) == url  # itself is not a part of it
    assert Path(url).stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in out.iterdir()) == ["_run.json", "index.html"]
    run = json.loads((out / "_run.json").read_text())
    assert (run["command"], run["done"], run["skipped"], len(run["inputs"])) == ("report", 0, 5, 5)


def test_a_rerun_that_does_nothing_leaves_the_page(folders: dict[str, Path]) -> None:
    """Its records say that all was skipped; the page is about what lies there."""
    before = page_of(*folders.values())
    for folder in folders.values():
        run = json.loads((folder / "_run.json").read_text())
        write_json(folder / "_run.json", {**run, "done": 0, "skipped": run["done"]})
    assert page_of(*folders.values()) == before


def test_of_versions_the_latest_is_told(folders: dict[str, Path]) -> None:
    root = folders["model"].with_name("versions")
    for name in ("v1", "v2"):
        shutil.copytree(folders["model"], root / name)
    write_json(root / "latest.json", {"version": "v2", "digest": "d"})
    (root / "v2" / "README.md").write_text("# A card")
    for named, version in ((root, "v2"), (root / "v1", "v1")):
        (found,) = collect([str(named)])
        assert found.url == str(root / version)
        text = Page(page_of(named)).text
        assert ("version" in text, str(root / "v2" / "README.md") in text) == (True, version == "v2")
    assert [one.url for one in collect([str(root.parent)]) if one.command == "train"] == [
        str(folders["model"]), str(root / "v2"),
    ]  # fmt: skip


def test_refuses_what_is_no_out_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"photos has no _run\.json"):
        reporting.report([str(tmp_path / "photos")], out=str(tmp_path / "report"))
    with pytest.raises(UsageError, match="not a folder"):
        reporting.report([str(tmp_path / "nowhere")], out=str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[
            (0, "0"),
            (0.5633, "0.563"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (123.4, "123"),
            (54321, "54\u202f321"),
            (None, "–"),
        ],
        *[(0.99996, "1.00"), (99.96, "100"), (float("nan"), "–"), (0.0012, "0.0012"), (-3.5, "-3.50")],
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert reporting.number(value) == text


@given(st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**12), 10**12) | st.none())
def test_any_number_has_a_text(value: float | None) -> None:
    assert reporting.number(value)
    assert reporting.percent(value)


def test_figures_are_the_same_bytes_and_follow_the_page() -> None:
    history = [{"epoch": i, "loss": 1 / i, "val_miou": i / 10} for i in range(1, 6)]
    drawn = [figures.curves_figure(history) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] is not None
    assert "var(--ink)" in drawn[0]
    assert "var(--line)" in drawn[0]
    assert figures.INK not in drawn[0]
    assert drawn[0].startswith("<svg role=")
    assert figures.curves_figure([]) is None
    assert figures.curves_figure([{"epoch": 1, "loss": None}]) is None


def test_a_single_epoch_is_one_tick() -> None:
    drawn = figures.curves_figure([{"epoch": 1, "loss": 0.5}])
    assert drawn is not None
    assert drawn.count('<g id="xtick_') == 1


def test_what_was_judged_on_the_training_tiles_is_not_called_validation(folders: dict[str, Path]) -> None:
    described = json.loads((folders["model"] / "bundle.json").read_text())
    write_json(folders["model"] / "bundle.json", described | {"metrics": {"split": "train"}})
    text = " ".join(Page(page_of(folders["model"])).text.split())
    assert "with a training mIoU of 0.654" in text
    assert "validation" not in text


def test_footprints_are_where_they_should_be() -> None:
    """A multi-part footprint and one without any are taken as they are."""
    two = shapely.MultiPolygon([shapely.box(179, -5, 180, 5), shapely.box(-180, -5, -179, 5)])
    scenes = [
        {"number": 1, "footprint": shapely.to_wkb(two), "refused": ""},
        {"number": 2, "footprint": None, "refused": "tile"},
    ]
    assert figures.footprint_figure(scenes, {}) is not None
    assert figures.footprint_figure(scenes[1:], {}) is None


def test_tile_outlines_are_on_the_ground() -> None:
    """Against corners worked out by hand: 128 px of 10 m to the east and south of the origin."""
    import pyproj

    rows = {"scene_id": ["a", "unknown"], "row": [2, 0], "col": [3, 0]}
    outlines = list(reporting._outlines(rows, 128, {"a": ("EPSG:32632", (10, 0, 600000, 0, -10, 5000000))}))
    assert len(outlines) == 1
    to_ground = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32632", always_xy=True)
    ground = [tuple(round(value) for value in to_ground.transform(*corner)) for corner in outlines[0]]
    assert ground == [(600030, 4999980), (601310, 4999980), (601310, 4998700), (600030, 4998700)]


def test_picture_takes_pictures_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(b"<svg onload=alert(1)>")
    sink = io.BytesIO(png())
    assert sink.getvalue() == (tmp_path / "a.png").read_bytes()
    assert (reporting._picture(str(tmp_path), "a.png") or "").startswith("data:image/png;base64,iVBOR")
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "none.png", "../a.png", "sub/../a.png", "", None, 3, ".a", str(tmp_path / "a.png")):
        assert reporting._picture(str(tmp_path), name) is None


def evaluation(folder: Path, tables: dict[tuple[str, str, str | None], list[list[int]]], **more: Any) -> Path:
    """An evaluation's folder, as `evaluate` leaves it, from what it counted."""
    classes = [SegmentClass(0, "soil", "#ddcc77"), SegmentClass(1, "R&D <b>", "#332288")]
    counted = {key: np.array(table) for key, table in tables.items()}
    reliability = np.zeros((metrics.BINS + 1, 3), np.int64)
    reliability[[13, 18]] = [[100, 70, 65 * metrics.UNIT], [300, 240, 270 * metrics.UNIT]]
    folder.mkdir(parents=True)
    record(folder, "evaluate", settings={"split": "test"}, **more)
    write_json(folder / "metrics.json", metrics.assess(counted, reliability, classes))
    comparison.write_blocks(str(folder / "blocks.parquet"), counted)
    return folder


def tables_of(wrong: int) -> dict[tuple[str, str, str | None], list[list[int]]]:
    """Twelve blocks in three scenes, the later the worse."""
    return {
        (f"scene {i % 3}", f"{i}_0", "north" if i < 4 else "(outside)"): [
            [200 - wrong - i, wrong + i],
            [wrong * (i % 3), 100 - wrong * (i % 3)],
        ]
        for i in range(12)
    }


@pytest.mark.parametrize("name", ["blocks.parquet", "_quarantine.parquet", "_run.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folders = [evaluation(tmp_path / one, tables_of(3)) for one in ("a", "b")]
    (folders[1] / name).write_text("[]")
    with pytest.raises(SattileError, match=f"b/{name} is .*damaged"):
        page_of(*folders)


def test_classes_in_another_order_are_the_same_classes() -> None:
    counted = {key: np.array(table) for key, table in tables_of(3).items()}
    turned = {key: table[::-1, ::-1] for key, table in counted.items()}
    best, found = comparison.differences([(["soil", "wood"], counted), (["wood", "soil"], turned)])
    assert best == 0
    assert found[1] is not None
    assert found[1][0] == 0


def text_of(*folders: Path) -> str:
    html = re.sub("</t[dh]>", r" \g<0>", page_of(*folders))
    return " ".join(Page(html).text.replace("\u202f", " ").split())


def test_one_evaluation_says_how_sure_its_numbers_are(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", tables_of(10))
    measured = json.loads((folder / "metrics.json").read_text())
    text = text_of(folder)
    low, high = measured["intervals"]["miou"]
    assert f"mIoU {measured['miou']:.3f} [{low:.3f}, {high:.3f}]" in text
    for name in ("iou", "precision", "recall", "f1"):
        for one in ("soil", "R&D <b>"):
            low, high = measured["intervals"]["classes"][one][name]
            assert f"{measured['classes'][one][name]:.3f} [{low:.3f}, {high:.3f}]" in text
    assert "by resampling 12 spatial blocks" in text
    assert (
        "Intervals follow from 12 spatial blocks: so few tell little of other ground; take them for too narrow." in text
    )
    # (100 |0.7 - 0.65| + 300 |0.8 - 0.9|) / 400
    assert "Expected calibration error (ECE) 0.0875, the largest of a bin 0.100" in text
    assert "Comparison" not in text
    north = measured["regions"]["north"]
    low, high = north["intervals"]["miou"]
    assert f"north {north['miou']:.3f} [{low:.3f}, {high:.3f}]" in text
    by_scene = text[text.index("By scene, worst first") :]
    order = sorted(measured["scenes"], key=lambda name: measured["scenes"][name]["miou"])
    assert order != sorted(order)
    assert sorted(order, key=by_scene.index) == order


def test_why_there_is_no_interval_is_said(tmp_path: Path) -> None:
    text = text_of(evaluation(tmp_path / "e", {("a", "0_0", None): [[5, 1], [2, 7]]}))
    assert "No intervals: all counted pixels lie in one spatial block, and it takes two at least." in text
    assert "95 %" not in text


def test_several_evaluations_are_compared_on_the_same_ground(tmp_path: Path) -> None:
    network = {"arch": "unet-small", "parameters": 123456}
    good = evaluation(tmp_path / "a", tables_of(10), model="work/good", network=network, delivered_mpix_per_s=2.5)
    bad = evaluation(tmp_path / "b", tables_of(14), model="work/bad")
    text = text_of(bad, good)
    mious = {name: json.loads((folder / "metrics.json").read_text())["miou"] for name, folder in
             (("good", good), ("bad", bad))}  # fmt: skip
    table = text[text.index("Comparison") : text.index("Differences to good are paired")]
    assert table.index("good unet-small 123 456") < table.index("bad –")
    stacks = [
        np.array(list(tables_of(wrong).values()))[np.argsort([f"{i}_0" for i in range(12)])] for wrong in (14, 10)
    ]
    difference, interval = metrics.paired_difference(*stacks)
    assert difference == pytest.approx(mious["bad"] - mious["good"])
    assert interval is not None
    assert f"{reporting.number(difference)}{reporting.between(interval)}" in table
    assert "2.50" in table
    assert "Not comparable" not in text
    page = page_of(bad, good)
    assert "IoU of good, bad with intervals" in page
    assert "of right pixels by score, of good, bad" in page
    Page(page)  # well-formed, and nothing of it escapes


def test_evaluations_of_other_pixels_are_not_compared(tmp_path: Path) -> None:
    good, same = (evaluation(tmp_path / name, tables_of(wrong), model=name) for name, wrong in (("a", 10), ("b", 11)))
    fewer = tables_of(2)
    fewer.popitem()
    other = evaluation(tmp_path / "c", fewer, model="c")
    moved = tables_of(2)
    moved["scene 0", "0_0", "north"][1][1] -= 1
    one_less = evaluation(tmp_path / "d", moved, model="d")
    assert "Not comparable: no two of these" in text_of(good, other)
    assert "with intervals" not in page_of(good, other)
    assert "Not comparable: no two of these" in text_of(good, one_less)
    text = text_of(other, one_less, good, same)
    assert "Differences to a are paired" in text
    assert "Not comparable with a: c, d counted other pixels or classes" in text
    assert "IoU of a, b with intervals" in page_of(other, one_less, good, same)
    # Other regions of the same pixels are no hindrance.
    renamed = {(scene, block, "all"): table for (scene, block, _), table in tables_of(12).items()}
    assert "Not comparable" not in text_of(good, evaluation(tmp_path / "e", renamed, model="e"))


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = (
        evaluation(tmp_path / name, tables_of(wrong), model=f"{name}/model") for name, wrong in (("a", 10), ("b", 11))
    )
    assert "Differences to model (a) are paired" in text_of(first, second)


def test_what_was_counted_is_read_back(tmp_path: Path) -> None:
    counted = {key: np.array(table) for key, table in tables_of(3).items()}
    paths = [tmp_path / name for name in "ab"]
    comparison.write_blocks(str(paths[0]), counted)
    comparison.write_blocks(str(paths[1]), dict(reversed(counted.items())))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = comparison.read_blocks(str(paths[0]))
    assert found is not None
    assert {key: table.tolist() for key, table in found.items()} == tables_of(3)
    assert comparison.read_blocks(str(tmp_path / "c")) is None
    comparison.write_blocks(str(tmp_path / "c"), {})
    assert comparison.read_blocks(str(tmp_path / "c")) == {}
