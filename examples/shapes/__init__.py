"""The shapes world: a small open-vocabulary video task that needs no download.

Images and videos of drawn shapes stand in for the web images of CLIP and for Kinetics. The modules
build on each other in this order:

- :mod:`examples.shapes.world`: the vocabulary, the splits, the captions;
- :mod:`examples.shapes.glyphs`, :mod:`examples.shapes.raster`, :mod:`examples.shapes.motion`,
  :mod:`examples.shapes.drawing`: from names to pixels;
- :mod:`examples.shapes.clips`: the data set of H.264 files and its annotation lists;
- :mod:`examples.shapes.model`, :mod:`examples.shapes.pretrain`: the CLIPs, in three sizes, and the
  script that makes their weights;
- :mod:`examples.shapes.studies`, :mod:`examples.shapes.experiment`,
  :mod:`examples.shapes.schedule`, :mod:`examples.shapes.run`: which runs there are, what a run
  does, how several share the processes, and the command;
- :mod:`examples.shapes.results`, :mod:`examples.shapes.report.statements`,
  :mod:`examples.shapes.report.sections`, :mod:`examples.shapes.report.page`: the results file, what
  it says of the paper's claims, and the page;
- :mod:`examples.shapes.comparison` and the modules whose names begin like it: the same beside
  ViFi-CLIP and Vita-CLIP.
"""
