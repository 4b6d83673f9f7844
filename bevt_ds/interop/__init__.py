"""For other libraries: checkpoints in their layouts, compared with their models on the same input; features in files.

convert.py is `bevt convert`: writers.py has a function for each target, references.py builds the models of torchvision,
timm and Hugging Face. features.py is `bevt features`; pipeline.py is one call from frames to features; hugging_face.py
what transformers' AutoModel finds. What is read is in `bevt_ds.model`. Start with convert.py.
"""
