"""Teacher responses, as a Ray job.

ray job submit --working-dir . -- python jobs/generate.py RECIPE [--set key=value …]
"""

from deltaray.cli.submit.script import run_script

run_script("generate")
