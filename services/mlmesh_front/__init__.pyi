# For type checkers that look at the sources and not at the built module.
from mlmesh_front.mlmesh_front import BUCKETS as BUCKETS
from mlmesh_front.mlmesh_front import Call as Call
from mlmesh_front.mlmesh_front import DirectCall as DirectCall
from mlmesh_front.mlmesh_front import Front as Front
from mlmesh_front.mlmesh_front import __version__ as __version__
from mlmesh_front.mlmesh_front import split as split
