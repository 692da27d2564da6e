"""The page of a run folder: what it shows, what it leaves out, and that nothing in a folder can break out of it."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fastnas.genotype import Genotype, NASBench201Genotype, OneShotGenotype
from fastnas.report import draw_genotype, plot_alphas, write_page
from fastnas.report.curves import Band, Line, Stage, curves_svg
from fastnas.search import Search, SearchConfig
from fastnas.search.run import RunFolder

OPTIONS = {"space": "nb201", "method": "darts", "relaxation": "softmax", "k": 1, "channels": 4, "layers": 3}
OPTIONS |= {"data": "digits", "seed": 7, "device": "cpu", "epochs": 4, "alpha_betas": [0.5, 0.999], "root": None}
CONV = NASBench201Genotype(("nor_conv_3x3",) * 6)
VOID = {"meta", "link", "img", "br", "hr", "input"}  # elements without an end


class Page(HTMLParser):
    """What a page consists of; raises where its elements are not nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("section")]

    @property
    def said(self) -> list[str]:
        """What the pictures say to those who do not see them."""
        return [a.get("aria-label", "") for tag, a in self.elements if a.get("role") == "img"]

    def rows(self, section: str) -> list[list[str]]:
        part = self.source.partition(f'<section id="{section}"')[2].partition("</section>")[0]
        return [
            re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr><td>.*?</tr>", part, re.DOTALL)
        ]


def today(epochs: int = 4) -> list[dict[str, Any]]:
    """The rows of a metrics.csv as fastnas 0.2 wrote it."""
    return [
        {
            "epoch": e,
            "lr": 0.1 / e,
            "train_loss": 2.0 / e,
            "train_accuracy": 0.5 + e / 100,
            "alpha_loss": "nan" if e == 1 else 1.5,
            "valid_loss": 2.5 / e,
            "valid_accuracy": 0.4 + e / 100,
            "alpha_spread": 0.1 * e,
            "entropy": 1.6,
            "seconds": 30.0,
            "peak_memory": 400 * 2**20,
        }
        for e in range(1, epochs + 1)
    ]


def measured(epochs: int = 6, genotype: Any = CONV, **measures: Sequence[Any]) -> list[dict[str, Any]]:
    """The rows of two stages, with further columns."""
    rows = []
    for n, row in enumerate(today(epochs)):
        first = n < epochs // 2
        row = {"epoch": row.pop("epoch"), "stage": 1 if first else 2, "k": 4 if first else 2, **row}
        seconds, memory = row.pop("seconds"), row.pop("peak_memory")
        chosen = genotype[n] if isinstance(genotype, list) else genotype
        row["genotype"] = chosen if isinstance(chosen, str) else chosen.to_text()
        row |= {name: values[n] for name, values in measures.items()}
        rows.append(
            {**row, "seconds": seconds if first else 2 * seconds, "peak_memory": memory if first else 3 * memory}
        )
    return rows


def run_folder(
    path: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    genotype: Any = CONV,
    options: Mapping[str, Any] = OPTIONS,
    pictures: bool = False,
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    text = "# A search of fastnas 9.8 with torch 2.13. To repeat it:\n#   fastnas search\n" + yaml.safe_dump(
        dict(options)
    )
    (path / "config.yaml").write_text(text)
    if rows:
        with (path / "metrics.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    if isinstance(genotype, str):
        (path / "genotype.txt").write_text(genotype)
    else:
        genotype.save(path / "genotype.json")
    if pictures:
        draw_genotype(genotype, path)
        plot_alphas(np.ones((2, 1, 2)), ["a", "b"], [(1, 0)], path / "alphas.png")
    return path


def test_a_run_of_today(tmp_path: Path) -> None:
    config = SearchConfig(space="nb201", channels=4, layers=3, epochs=1, batch_size=256)
    with RunFolder(tmp_path / "run") as folder:
        folder.start(config)
        search = Search(config)
        result = search.run(on_epoch=folder.record)
        folder.finish(search)
    path = write_page(tmp_path / "run")
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    assert {"cells", "curves", "weights", "costs", "options", "numbers"} <= set(page.sections)
    assert result.genotype.to_text() in page.text
    assert f"{result.history[-1].valid_accuracy:.1%}" in page.text
    assert len(page.all("img")) == 2


def test_an_old_folder(tmp_path: Path) -> None:
    page = Page(write_page(run_folder(tmp_path / "old", today(), pictures=True)))
    assert page.sections == ["cells", "curves", "weights", "costs", "options", "numbers"]
    for shown in ("44.0%", "2 min 0 s", "30 s an epoch", "400 MiB", "fastnas 9.8", "seed 7"):
        assert shown in page.text
    assert page.rows("costs") == [["1", "1–4", "1", "2 min 0 s", "30 s", "400 MiB"]]
    assert ["alpha_betas", "0.5, 0.999"] in page.rows("options")
    assert ["root", "–"] in page.rows("options")
    assert len(page.rows("numbers")) == 4
    assert page.rows("numbers")[0][4] == "–"  # the alphas' loss while they warm up
    assert "Loss, over the epochs: train from 2 in epoch 1 to 0.5 in epoch 4; valid" in page.said[0]
    assert "α steps from 1.5 in epoch 2" in page.said[0]


def test_all_measures(tmp_path: Path) -> None:
    some = ["", 0.2, "", 0.3, "", 0.25]
    rows = measured(
        **{
            "discrete/accuracy": some,
            "discrete/skips": [0.0] * 6,
            "table/cifar100": [60.0, 61, 62, 63, 64, 70],
            "sampled/cifar100_mean": ["", 50.0, "", 55.0, "", 60.0],
            "sampled/cifar100_std": ["", 5.0, "", 4.0, "", 3.0],
            "hessian/eigenvalue": some,
            "hessian/trace": [-1.0] * 6,
            "hessian/of_mine": [1.0] * 6,
            "hessian/norm": [""] * 6,
        }
    )
    page = Page(write_page(run_folder(tmp_path, rows, options={**OPTIONS, "samples": 20})))
    assert page.sections == [
        *("cells", "curves", "skips", "tables", "hessian", "changes", "costs", "options", "numbers"),
    ]
    assert "25.0%" in page.text  # the derived architecture's
    said = "\n".join(page.said)
    assert "derived from 20.0% in epoch 2 to 25.0% in epoch 6" in said
    assert "cifar100, percent, over the epochs: derived from 60 in epoch 1 to 70 in epoch 6; drawn from 50" in said
    assert "of 20 that are drawn from the relaxation" in page.text
    assert "Largest eigenvalue" in said
    assert "hessian/of_mine" in said
    assert "Norm," not in said  # a column, but no number
    assert "with respect to the weights of the mixed operations" in page.text
    assert page.rows("costs") == [
        ["1", "1–3", "4", "1 min 30 s", "30 s", "400 MiB"],
        ["2", "4–6", "2", "3 min 0 s", "1 min 0 s", "1.17 GiB"],
    ]
    assert "1, k = 4" in page.source
    assert "2, k = 2" in page.source


def test_a_search_that_goes_on(tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 10}
    page = Page(write_page(run_folder(tmp_path, today(), options=options)))
    assert "4 of 10" in page.text
    assert len(page.all("img")) == 1  # the cell, which is drawn when a search ends
    assert "0 to 1: nor_conv_3x3; 0 to 2: nor_conv_3x3" in page.all("img")[0]["alt"]


def test_before_the_first_epoch(tmp_path: Path) -> None:
    run_folder(tmp_path)
    (tmp_path / "genotype.json").unlink()
    page = Page(write_page(tmp_path))
    assert page.sections == ["options"]
    assert "No epoch has ended yet" in page.text


@pytest.mark.parametrize(("skips", "warned"), [(2, False), (3, False), (4, True), (6, True)])
def test_the_warning_where_skips_take_over(tmp_path: Path, skips: int, warned: bool) -> None:
    genotype = NASBench201Genotype(("skip_connect",) * skips + ("nor_conv_1x1",) * (6 - skips))
    for form, rows in (("old", today()), ("new", measured(genotype=genotype))):
        page = Page(write_page(run_folder(tmp_path / form, rows, genotype)))
        assert page.text.count(f"Skips take over: {skips / 6:.0%} of the operations") == (2 if warned else 0)


def test_skips_that_took_over_on_the_way(tmp_path: Path) -> None:
    rows = measured(**{"discrete/skips": [0.6, 0.7, 0.2, 0.1, 0.9, 0.5]})
    page = Page(write_page(run_folder(tmp_path, rows)))
    assert "in epochs 1 to 2 and 5, but they are not in the end" in page.text
    assert "Skips take over" not in page.text


def test_changes_of_the_architecture(tmp_path: Path) -> None:
    concat, reduce = range(2, 4), [("avg_pool_3x3", 0)] * 2 + [("avg_pool_3x3", 1)] * 2
    same = [("a", 1), ("b", 0), ("c", 2), ("d", 0)]
    swapped = [("b", 0), ("a", 1), ("c", 2), ("d", 0)]
    other = [("a", 1), ("b", 0), ("x", 1), ("c", 2)]
    genotypes = [Genotype(cell, concat, reduce, concat) for cell in (same, swapped, other, other)]
    page = Page(write_page(run_folder(tmp_path, measured(4, genotypes), genotypes[-1])))
    # the order of a node's inputs does not matter, and what stays is not said
    assert page.rows("changes") == [["3", "normal 1: d(k-2) → x(k-1)"]]
    assert "It changed in 1 of 3 epochs after the first; the last in epoch 3." in page.text


def test_no_change_of_the_architecture(tmp_path: Path) -> None:
    page = Page(write_page(run_folder(tmp_path, measured(4))))
    assert page.rows("changes") == [["–", "nothing"]]
    assert "it is the same after all 4 epochs" in page.text


def test_genotypes_of_nodes_and_of_unknown_notation(tmp_path: Path) -> None:
    one, two = OneShotGenotype(("a", "b"), ((0,), (0, 1), (2,))), OneShotGenotype(("a", "c"), ((0,), (1,), (1, 2)))
    page = Page(write_page(run_folder(tmp_path / "nodes", measured(2, [one, two]), two)))
    assert page.rows("changes") == [["2", "node 2: b(0,1) → c(1)\noutput: (2) → (1,2)"]]
    page = Page(write_page(run_folder(tmp_path / "own", measured(2, ["mine: 1", "mine: 2"]), "mine: 2")))
    assert page.rows("changes") == [["2", "architecture: mine: 1 → mine: 2"]]
    assert "mine: 2" in page.text.partition("Curves")[0]
    assert "skips" not in page.sections


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}&lt; $\\frac{"


def test_nothing_in_a_folder_becomes_markup(tmp_path: Path) -> None:
    options = {**OPTIONS, HOSTILE: HOSTILE, "method": HOSTILE, "space": HOSTILE, "epochs": HOSTILE, "device": HOSTILE}
    op = "<script>alert(2)</script>"
    evil, concat = Genotype([(op, 0), (op, 1)], [2], [(op, 0), (op, 1)], [2]), NASBench201Genotype((op,) * 6)
    for n, (genotype, changing) in enumerate(
        [(HOSTILE, [HOSTILE, "x"] * 3), (evil, [evil, HOSTILE] * 3), (concat, CONV)]
    ):
        names = {f"table/{HOSTILE}": [1.0] * 6, f"hessian/{HOSTILE}": [1.0] * 6, HOSTILE: [HOSTILE] * 6}
        rows = [{**row, "k": HOSTILE} for row in measured(genotype=changing, **names)]
        page = Page(write_page(run_folder(tmp_path / f"{n}<b>'\"", rows, genotype, options)))
        assert page.all("script", "iframe", "object", "b") == []
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert {a["src"].partition(",")[0] for a in page.all("img")} <= {"data:image/png;base64"}
        assert page.text.count(HOSTILE) >= 10
        assert "49" not in page.text.partition("{{ 7 * 7 }}")[0][-50:]
        assert f"hessian/{HOSTILE}, over the epochs: hessian/{HOSTILE} from 1" in "\n".join(page.said)


def test_the_page_is_whole_and_accessible(tmp_path: Path) -> None:
    rows = measured(12, **{"discrete/accuracy": [0.3] * 12, "hessian/norm": list(range(1, 1300, 100))[:12]})
    page = Page(write_page(run_folder(tmp_path, rows, pictures=True)))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    used = re.findall(r'(?:url\(#|href="#|labelledby=")([^")]*)', page.source)
    assert set(used) <= set(ids)
    assert len(used) > 20
    # nothing is loaded: the only addresses are within the page, or the picture itself
    for _, attributes in page.elements:
        assert not attributes.get("href", "#").strip("#").startswith(("http", "//", "file"))
        assert attributes.get("src", "data:").startswith("data:")
    assert "http" not in re.sub(r"arxiv\S*", "", page.source.replace("http-equiv", ""))
    assert "@import" not in page.source
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(len(a["alt"]) > 20 and int(a["width"]) > 100 for a in page.all("img"))
    assert len(page.all("svg")) == len(page.said) > 5
    assert all(len(said) > 20 for said in page.said)
    assert all(a == {"scope": "col"} for a in page.all("th"))
    for feature in ("prefers-color-scheme: dark", "@media print", 'name="viewport"', "default-src 'none'"):
        assert feature in page.source


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_page(run_folder(tmp_path, today()))
    first = path.read_bytes()
    assert write_page(tmp_path).read_bytes() == first  # nothing in it depends on when it is made
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    (tmp_path / "metrics.csv").write_text("no,columns\n1,2\n")
    with pytest.raises(ValueError, match=r"metrics\.csv cannot be read.*'epoch'"):
        write_page(tmp_path)
    assert path.read_bytes() == first


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run of fastnas"):
        write_page(tmp_path)
    for text in ("- 1\n", "a: [", "a: !!python/object:os.system x\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
            write_page(tmp_path)
    run_folder(tmp_path)
    for cut in ("epoch,lr\n1,0.1\nx,0.1\n", "\ufeff\n", "epoch,lr\n1,inf\n2\n3,1,4,5\n"):
        (tmp_path / "metrics.csv").write_text(cut, encoding="utf-8")
        if cut.endswith("5\n"):  # short and long rows are those of a file that grew by hand: what can be read is shown
            assert len(Page(write_page(tmp_path)).rows("numbers")) == 3
        else:
            with pytest.raises(ValueError, match=r"metrics\.csv cannot be read"):
                write_page(tmp_path)


EPOCHS = np.arange(1.0, 9.0)


def test_curves_take_the_colours_of_the_page() -> None:
    line = Line("down", np.linspace(0.008, 0.001, 8))
    svg = curves_svg(EPOCHS, [line, Line("up", EPOCHS / 80)], [Band("between", EPOCHS / 90, EPOCHS / 70)], key="one")
    assert not re.findall(r"(?<!, )#[0-9a-f]{6}", svg)  # only as what holds where the page names none
    assert "var(--blue, #0072b2)" in svg
    assert "font-family" not in svg
    assert set(re.findall(r'id="(.*?)-', svg)) == {"one"}
    # hundredths are enough for coordinates, and not for what is read
    assert re.findall(r">(0\.00\d)<", curves_svg(EPOCHS, [line])) == ["0.002", "0.004", "0.006", "0.008"]
    assert not re.findall(r"d=\"[^\"]*\.\d\d\d", svg)


@pytest.mark.parametrize(("length", "rows"), [(8, 1), (40, 3)])
def test_legends_stay_inside_the_picture(length: int, rows: int) -> None:
    labels = [letter * length for letter in "xyz"]
    svg = curves_svg(EPOCHS, [Line(label, EPOCHS) for label in labels])
    heights = [re.findall(rf' y="(.*?)"[^>]*>{label}<', svg) for label in labels]
    assert len({y for (y,) in heights}) == rows


def test_curves_leave_gaps_and_mark_single_points() -> None:
    values = np.array([np.nan, 2.0, np.nan, np.nan, 3.0, np.nan, np.nan, np.nan])
    svg = curves_svg(EPOCHS, [Line("a", values)], limit=2.5)
    assert svg.count("<use") >= 2
    assert "NaN" not in svg
    assert "nan" not in svg


def test_labels_are_drawn_as_they_are() -> None:
    hostile = "$\\frac{ <script>"
    stages = [Stage(hostile, 1, 4), Stage("$x$", 5, 8)]
    lines = [Line(hostile, EPOCHS), Line("b", EPOCHS)]
    svg = curves_svg(EPOCHS, lines, stages=stages, label_stages=True)
    assert svg.count("$\\frac{ &lt;script&gt;") == 2
    assert "$x$" in svg
    # one stage is no stage
    assert "$x$" not in curves_svg(EPOCHS, lines, stages=stages[1:], label_stages=True)


def test_a_logarithmic_axis_and_percent() -> None:
    svg = curves_svg(EPOCHS, [Line("a", 10.0**-EPOCHS)], log=True)
    assert ">0.001<" in svg
    percent = curves_svg(EPOCHS, [Line("a", EPOCHS / 8)], percent=True)
    assert re.findall(r">(\d+%)<", percent) == ["25%", "50%", "75%", "100%"]


def test_pictures_do_not_change_matplotlibs_settings() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    curves_svg(EPOCHS, [Line("a", EPOCHS)])
    assert dict(mpl.rcParams) == before


def test_drawing_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    write_page(run_folder(tmp_path, measured()))
    assert torch.equal(torch.get_rng_state(), state)
