"""The methods of this library beside each other, on three questions.

The modules build on each other in this order:

- :mod:`examples.shapes.trials.cells`: the divisions of the actions, and the three questions;
- :mod:`examples.shapes.trials.clips`: the clips of a cell, and held-out stills;
- :mod:`examples.shapes.trials.workshop`: one training loop for all methods;
- :mod:`examples.shapes.trials.registry`, :mod:`examples.shapes.trials.methods`: the tables of the
  trainings and of the methods;
- :mod:`examples.shapes.trials.tasks`, :mod:`examples.shapes.trials.tuning`,
  :mod:`examples.shapes.trials.runner`: the pieces of work, the choice of settings, the run;
- :mod:`examples.shapes.trials.statistics`, :mod:`examples.shapes.trials.claims`,
  :mod:`examples.shapes.trials.page`, :mod:`examples.shapes.trials.advice`: tests, verdicts, pages.

**The budget** of 4 hours of 2 cores is 28,800 seconds of one core. Measured on a virtual machine
with 2 cores, with one thread a process:

- A plain training step of 16 clips of 8 frames takes 0.092 s, so a run of 200 steps takes 18 s. The
  trainings of a cell cost as much as 28 plain runs: 520 s.
- The evaluation of a clip takes 1.8 ms in batches of 16 clips. A point (one state dict on three
  lists of 2,048 clips, and 1,024 stills) takes 11.5 s. A cell has 36 points: 410 s.
- A clip takes 13 ms to draw, encode and decode, so the 6,656 clips of a cell take 89 s.

A cell therefore takes 1,020 s, and 20 cells take 20,400 s. The tuning of each method takes four
runs and 24 points on lists of 512 clips. The trainings of the tuning take 1,300 s, the points
1,500 s. Together this is 23,200 s of one core, or 3.2 hours of 2 cores.
"""
