"""Every figure in docs/results.md, made again by `make results`.

Each experiment drives the `lofi` command line as a user would, on the models and data that LOFI_SHARED names, and
returns a `Section`: what was asked, the commands, the table. Sections are kept as JSON in results/figures, so one
experiment can be run again without the others; the page is written from them.
"""
