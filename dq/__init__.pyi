# The public names, each listed here only: lazy_loader reads this file at run time, type checkers as a stub.

from .cluster.kmeans import kmeans as kmeans
from .cluster.prototypes import Prototypes as Prototypes
from .cluster.prototypes import image_weights as image_weights
from .config.protocols import list_protocols as list_protocols
from .config.protocols import student_config as student_config
from .config.pruning import PruneConfig as PruneConfig
from .config.refinement import FADRM as FADRM
from .config.refinement import FRePo as FRePo
from .config.refinement import Teddy as Teddy
from .config.schema import ClusterConfig as ClusterConfig
from .config.schema import GenerateConfig as GenerateConfig
from .config.schema import MethodConfig as MethodConfig
from .config.schema import RunConfig as RunConfig
from .config.schema import load_config as load_config
from .config.students import StudentConfig as StudentConfig
from .config.teachers import TeacherConfig as TeacherConfig
from .config.trajectories import Trajectory as Trajectory
from .core.errors import InputError as InputError
from .core.errors import RunError as RunError
from .data.load import load_source as load_source
from .data.source import ImageSource as ImageSource
from .diffusion.generator import LatentGenerator as LatentGenerator
from .distilled.external import load_set as load_set
from .distilled.hub import push_folder as push_folder
from .distilled.set import DistilledSet as DistilledSet
from .evaluation.baselines import select as select
from .evaluation.evaluate import evaluate as evaluate
from .run.distill import DistillPipeline as DistillPipeline
from .run.share import pull as pull
from .run.share import push_model as push_model

__version__: str
__all__: list[str]
