"""The demo: questions in two languages about tables in the prompt, answered with SQL that is executed.

Flow: pools -> schemas -> sentences, grammar -> execute -> dataset; `recipe` holds what was found to work.
"""
