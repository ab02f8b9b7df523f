"""First values of A and B that need data: fastlora.initialize (dispatch.py).

settings.py holds its arguments and checks, layer_inputs.py runs the base and yields what enters
each projection; eva.py, corda.py and lora_ga.py are the three methods.
"""
