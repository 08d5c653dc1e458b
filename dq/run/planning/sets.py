"""Sets of a planned run: settings, numbers of images and of draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dq.config.pruning import PruneConfig
from dq.config.reader import to_dict
from dq.config.schema import ClusterConfig, GenerateConfig, MethodConfig, RunConfig
from dq.core.seeds import digest_of

if TYPE_CHECKING:
    from dq.data.source import ImageSource


@dataclass(frozen=True)
class PlannedSet:
    """One set of a run: how it is made and how many images it has."""

    ipc: int
    method: str
    how: MethodConfig
    cluster: ClusterConfig
    generate: GenerateConfig
    prune: PruneConfig
    class_images: tuple[int, ...]  # of every class

    @property
    def images(self) -> int:
        return sum(self.class_images)

    @property
    def together(self) -> bool:
        """Whether the images of a class are denoised together."""
        return self.generate.together and self.how.representative != "real"

    @property
    def prototypes(self) -> int:
        """Of a class that is large enough."""
        return self.cluster.prototypes(self.ipc)

    @property
    def draws(self) -> int:
        """Images that are drawn, candidates included."""
        from dq.run.stages.select import selecting_teacher

        draws = self.generate.candidates if self.how.representative != "real" else 1
        return self.images * (draws if selecting_teacher(self.how, self.generate) else 1)

    @property
    def real_candidates(self) -> int:
        """Real images that compete with the draws, at most."""
        from dq.run.stages.select import selecting_teacher

        return self.images * self.generate.real_candidates if selecting_teacher(self.how, self.generate) else 0

    @property
    def points(self) -> str:
        """Names the prototypes, which several methods may share."""
        from dq.run.stages.cluster import cluster_settings
        from dq.run.stages.prune import prune_settings

        return digest_of([self.ipc, cluster_settings(self.cluster), prune_settings(self.prune)])

    @property
    def drawn(self) -> str:
        """Names the drawn images, which methods that differ in weights or refinement share."""
        settings = "real" if self.how.representative == "real" else to_dict(self.generate)
        return digest_of([self.points, self.how.representative, settings])


def planned_sets(config: RunConfig, source: ImageSource) -> list[PlannedSet]:
    """The sets of a run, ipc by ipc."""
    from dq.config.methods import resolved_method
    from dq.run.folder import images_per_class

    counts = source.class_counts().tolist()
    sets = []
    for ipc in config.ipc:
        for method in config.methods:
            resolved = resolved_method(config, method)
            sets.append(PlannedSet(ipc, method, *resolved, tuple(images_per_class(resolved, ipc, counts))))
    return sets
