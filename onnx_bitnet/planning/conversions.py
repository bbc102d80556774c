"""Conversions that a search tries: measured once, and never again what another search measured before."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from onnx_bitnet import cache
from onnx_bitnet.conversion.convert import convert_as_told
from onnx_bitnet.data.feeds import Feeds
from onnx_bitnet.errors import NotFinite
from onnx_bitnet.planning.goals import ALL_LOST, Goals
from onnx_bitnet.planning.samples import Samples
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.report import Progress, Report
from onnx_bitnet.validation.metrics import Metrics
from onnx_bitnet.validation.validate import validate


@dataclass(frozen=True, eq=False)
class Conversion:
    """A choice that was converted and measured.

    Args:
        nbytes: size of the files; None if they could not be made, because values ceased to be finite.
        loss: of the outputs.
        missed: which goals are missed, in words.
        data: what it was rounded by.
        checks: what it was measured on.
        files: report and path of the model, which is there as long as the folder of the search, unless goals
            are missed; None if another search made it, and kept what it measured.
    """

    nbytes: int | None
    loss: float
    missed: tuple[str, ...]
    data: Feeds
    checks: Feeds
    files: tuple[Report, Path] | None = None

    @property
    def made(self) -> tuple[Report, Path]:
        """Report and path of a conversion that this search made.

        Raises:
            NotFinite: it could not be finished.
        """
        if self.files is None:
            raise NotFinite(self.missed[0])
        return self.files

    @property
    def size(self) -> int:
        """Bytes of the files.

        Raises:
            NotFinite: there are none.
        """
        if self.nbytes is None:
            raise NotFinite(self.missed[0])
        return self.nbytes


@dataclass(frozen=True, eq=False)
class Conversions:
    """Converts a model by one recipe after another, and measures what comes out.

    Args:
        source: the model.
        asked: the recipe with the goals.
        goals: of that recipe.
        samples: to round by and to measure on.
        workplace: where to convert, and the name of the file.
        strict: as in `convert`.
        progress: as in `convert`.
    """

    source: Path
    asked: Recipe
    goals: Goals
    samples: Samples
    workplace: Path
    strict: bool
    progress: Progress | None

    def known(
        self, recipe: Recipe, data: Feeds, checks: Feeds, files: tuple[Report, Path] | None = None
    ) -> Conversion:
        """Return what another search measured, or measure; a function of the user's is asked each time.

        Args:
            recipe: without goals.
            data: to round by.
            checks: to measure on.
            files: of the conversion, if it is there already.
        """
        kept = cache.recall(self._key(recipe, data, checks)) if self.goals.metric is None else None
        if kept is None:
            return self.convert(recipe, data, checks, files)
        if kept["error"] is not None:
            return Conversion(None, ALL_LOST, (f"{self.source}: {kept['error']}",), data, checks)
        outputs = {name: Metrics(**metrics) for name, metrics in kept["outputs"].items()}
        missed = self.goals.missed(outputs, None)
        return Conversion(kept["nbytes"], self.goals.loss(outputs), missed, data, checks)

    def convert(
        self, recipe: Recipe, data: Feeds, checks: Feeds, files: tuple[Report, Path] | None = None
    ) -> Conversion:
        """Convert, unless that was done, and measure; see `known`."""
        key = self._key(recipe, data, checks)
        try:
            report, output = made = files or self._files(recipe, data)
        except NotFinite as error:
            why = str(error)
            # The same model may be elsewhere next time.
            cache.keep(key, {"error": why.removeprefix(f"{self.source}: ")})
            return Conversion(None, ALL_LOST, (why,), data, checks)
        result = validate(
            self.source,
            output,
            checks,
            layers=False,
            mask=self.asked.mask,
            metric=self.goals.metric,
        )
        outputs = {output.name: output.metrics for output in result.outputs}
        measured = {name: dataclasses.asdict(metrics) for name, metrics in outputs.items()}
        cache.keep(key, {"error": None, "nbytes": report.output_bytes, "outputs": measured})
        missed = self.goals.missed(outputs, result.task)
        if missed and files is None:
            shutil.rmtree(output.parent)
        return Conversion(report.output_bytes, self.goals.loss(outputs), missed, data, checks, made)

    def _key(self, recipe: Recipe, data: Feeds, checks: Feeds) -> str:
        by, on = ("all" if feeds is self.samples.everything else "a part" for feeds in (data, checks))
        name = self.workplace.name  # is in the file, if its data is beside it
        what = f"a conversion to {name} by {by}, measured on {on}"
        return self.samples.key(what, self.source, recipe)

    def _files(self, recipe: Recipe, data: Feeds) -> tuple[Report, Path]:
        """Convert into a folder of its own."""
        output = Path(tempfile.mkdtemp(dir=self.workplace.parent), self.workplace.name)
        report = convert_as_told(
            self.source, output, recipe, data=data, strict=self.strict, progress=self.progress
        )
        return report, output
