"""Evaluation: what a model says and how sure it is, as figures with 95 % intervals and a paired test against the base.

rouge, stemmer     ROUGE of our own, for every script               text           BLEU, chrF, exact match, syllables
labels             accuracy, F1 of classes and of spans             intervals      bootstrap intervals and paired tests
generation         batched decoding equal to single decoding        perplexity     the loss of every example
classify           the classes a model chooses                      run            all by name, base beside adapters

Importing this package imports nothing heavy: torch, transformers and sacrebleu load where they are used.
"""
