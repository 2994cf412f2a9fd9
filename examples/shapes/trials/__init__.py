"""The methods of this library beside each other, on three questions.

The modules build on each other in this order:

- :mod:`examples.shapes.trials.cells`: the divisions of the actions, and the three questions;
- :mod:`examples.shapes.trials.clips`: the clips of a cell, and held-out stills;
- :mod:`examples.shapes.trials.workshop`: one training loop for all methods;
- :mod:`examples.shapes.trials.registry`, :mod:`examples.shapes.trials.methods`: the tables of the
  trainings and of the methods;
- :mod:`examples.shapes.trials.tasks`, :mod:`examples.shapes.trials.tuning`,
  :mod:`examples.shapes.trials.runner`: the pieces of work, the choice of settings, the run;
- :mod:`examples.shapes.trials.reading`: the complete cells of a results file, and accuracies;
- :mod:`examples.shapes.trials.statistics`, :mod:`examples.shapes.trials.claims`: tests, verdicts;
- :mod:`examples.shapes.trials.wording`, :mod:`examples.shapes.trials.times`,
  :mod:`examples.shapes.trials.tables`, :mod:`examples.shapes.trials.sections`,
  :mod:`examples.shapes.trials.grid`, :mod:`examples.shapes.trials.verdicts`: tables and sentences;
- :mod:`examples.shapes.trials.advice`, :mod:`examples.shapes.trials.page`: the two pages.

**The budget** of 4 hours of 2 cores is 28,800 seconds of one core. Measured on a virtual machine
with 2 cores, with one thread a process, in clips of 4 frames:

- A plain training step of 16 clips takes 0.044 s, so a run of 200 steps takes 9 s. The trainings of
  a cell cost as much as 28 plain runs: 250 s.
- The evaluation of a clip takes 0.9 ms in batches of 16 clips. A point (one state dict on three
  lists of 2,048 clips, and on 1,024 stills) takes 6 s. A cell has 34 points, and the λ without
  labels cost as much as 6 points: 240 s.
- A clip takes 9 ms to draw, encode and decode, so the 6,656 clips of a cell take 60 s.

A cell therefore takes 550 s, and 40 cells take 22,000 s. The tuning of each method takes four
runs and 24 points on lists of 512 clips: 1,500 s for all methods. Together this is 23,500 s of one
core, or 3.3 hours of 2 cores.

The number of cells follows from the power: in a trial of four cells, the difference of Open-VCLIP
and FINE-TUNE at the same λ had a standard deviation of 2.0 points, with lists of 1,024 clips. With
40 cells and a level of 5 % divided by 100 claims, a true difference of 1.5 points is called clear
in 81 % of all cases at this deviation, and in 92 % at a deviation of 1.8 points
(:func:`examples.shapes.trials.statistics.power`). Lists of 2,048 clips have smaller deviations. The
page has the power at the deviations of its own results.
"""
