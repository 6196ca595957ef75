"""Handing over: an adapter or a merged model in another engine's form, checked against that engine's rules."""
