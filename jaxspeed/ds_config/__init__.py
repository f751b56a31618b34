"""DeepSpeed's ds_config.json as a `Config`, with a verdict on every key.

Every key is honoured, accepted as a no-op with the reason, or refused with what to do
instead. An unknown key is an error that names the nearest one: DeepSpeed ignores a
misspelled key at the top level in silence.
"""

from jaxspeed.ds_config.reader import read as read
from jaxspeed.ds_config.translate import report as report
from jaxspeed.ds_config.translate import run as run
from jaxspeed.ds_config.translate import to_config as to_config
from jaxspeed.ds_config.translate import translate as translate
from jaxspeed.ds_config.verdicts import Translation as Translation
from jaxspeed.ds_config.verdicts import UnknownKeyError as UnknownKeyError
from jaxspeed.ds_config.verdicts import Verdict as Verdict
