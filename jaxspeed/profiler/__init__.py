"""Where the work of a program is, by module, and where the time of a run goes."""

from jaxspeed.profiler.modules import ModuleCount as ModuleCount
from jaxspeed.profiler.modules import count as count
from jaxspeed.profiler.operations import Figures as Figures
from jaxspeed.profiler.profile import Profile as Profile
from jaxspeed.profiler.table import table as table
