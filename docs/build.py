"""Writes the pages of the public names: python docs/build.py FOLDER."""

import pathlib
import sys

import pdoc

import deepfm_ops

for name in deepfm_ops.__all__:  # loaded when first used, and pdoc looks without using
    setattr(deepfm_ops, name, getattr(deepfm_ops, name))
pdoc.render.configure(docformat="google", show_source=False)
pdoc.pdoc("deepfm_ops", output_directory=pathlib.Path(sys.argv[1]))
