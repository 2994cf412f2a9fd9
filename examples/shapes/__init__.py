"""The shapes world: a small open-vocabulary video task that needs no download.

Drawn images replace the web images of CLIP, and drawn videos replace Kinetics. The modules build on
each other in this order:

- :mod:`examples.shapes.world`: the vocabulary, the splits and the captions;
- :mod:`examples.shapes.glyphs`, :mod:`examples.shapes.raster`, :mod:`examples.shapes.motion`,
  :mod:`examples.shapes.drawing`: the outlines of the shapes, the rasteriser, the motions, and the
  drawing of stills and videos;
- :mod:`examples.shapes.clips`: the data set of H.264 files and its annotation lists;
- :mod:`examples.shapes.model`, :mod:`examples.shapes.pretrain`: the CLIPs in three sizes, and the
  command that makes their weights;
- :mod:`examples.shapes.studies`, :mod:`examples.shapes.experiment`,
  :mod:`examples.shapes.schedule`, :mod:`examples.shapes.progress`, :mod:`examples.shapes.run`: the
  list of all runs, the work of one run, the processes, the progress bar, and the command;
- :mod:`examples.shapes.results`: the results file of the studies;
- :mod:`examples.shapes.trials`: the comparison of all methods, and its pages.
"""
