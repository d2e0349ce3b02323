"""All stages that the recipe names, as a Ray job.

ray job submit --working-dir . -- python jobs/run.py RECIPE [--set key=value …]
"""

from deltaray.cli.submit.script import run_script

run_script("run")
