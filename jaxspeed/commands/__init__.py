"""The commands of `jaxspeed`, one file each; `jaxspeed.cli` reads their arguments."""
