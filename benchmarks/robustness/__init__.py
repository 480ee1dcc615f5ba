"""Bad inputs and kills: how cases are made, run and judged. `benchmarks.bad_inputs` and `benchmarks.kills` use it.

case.py      what is run, and what must hold afterwards
box.py       a directory a case: where it works, its home, its temporary folder, and things it must not touch
damage.py    bytes and JSON, damaged at random
seeds.py     whole bundles, checkpoints, pictures and packages that are damaged
kinds/       the generator: one function a kind of bad input
audit.py     what a process opens, starts and connects to
forks.py     commands in forks of one warm process, or in processes of their own
judge.py     what was wrong about the way a command ended
"""
