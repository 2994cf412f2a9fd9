"""The methods of this library beside each other, on three questions.

The modules build on each other in this order:

- :mod:`examples.shapes.trials.cells`: the divisions of the actions, and the three questions;
- :mod:`examples.shapes.trials.clips`: the clips of a cell, and held-out stills;
- :mod:`examples.shapes.trials.workshop`: one training loop for all methods;
- :mod:`examples.shapes.trials.registry`, :mod:`examples.shapes.trials.methods`: the tables of the
  trainings and of the methods;
- :mod:`examples.shapes.trials.tasks`, :mod:`examples.shapes.trials.tuning`,
  :mod:`examples.shapes.trials.codes`, :mod:`examples.shapes.trials.runner`: the pieces of work,
  the choice of settings, the code of a reader's own functions, the run;
- :mod:`examples.shapes.trials.reading`: the complete cells of a results file, and accuracies;
- :mod:`examples.shapes.trials.statistics`, :mod:`examples.shapes.trials.claims`: tests, verdicts;
- :mod:`examples.shapes.trials.wording`, :mod:`examples.shapes.trials.times`,
  :mod:`examples.shapes.trials.tables`, :mod:`examples.shapes.trials.sections`,
  :mod:`examples.shapes.trials.grid`, :mod:`examples.shapes.trials.verdicts`: tables and sentences;
- :mod:`examples.shapes.trials.advice_words`, :mod:`examples.shapes.trials.advice`,
  :mod:`examples.shapes.trials.page`: the two pages.

**The budget** of 4 hours of 2 cores is 28,800 seconds of one core. Measured on a virtual machine
with 2 cores, with one thread a process, in clips of 4 frames:

- The trainings and evaluations of a cell take 615 s. A plain training step of 16 clips takes 0.06
  to 0.08 s. A point (one state dict on three lists of 2,048 clips, and on 1,024 stills) takes 6 s.
- A clip takes 10 ms to draw, encode and decode, so the 6,656 clips of a cell take 70 s.
- The tuning of all methods takes four runs and 24 points each on lists of 512 clips: 2,000 s.

Together, 24 cells take 18,400 s of one core, or 2.6 hours of 2 cores.

The number of cells follows from the power (:func:`examples.shapes.trials.statistics.power`), at a
level of 5 % divided by the number of claims, and at the median deviation of the differences of two
methods. With the deviations of the first ten cells, 10 cells are enough to call a true difference
of 1.5 points clear nine times in ten in the mean of the three questions, and 16 cells on one
question. With 24 cells, deviations can be larger by a quarter. The page has the power at the
deviations of its own results.
"""
