"""What a run will take, before it starts and without a GPU: `bevt plan`.

activations.py runs the model on the meta device; compute.py counts FLOPs and turns measured rows into time; memory.py
adds up a rank's bytes; traffic.py what ZeRO sends; supply.py what decoding and storage must deliver. planning.py puts
them together, report.py prints it, cli.py is the command. Start with planning.py.
"""
