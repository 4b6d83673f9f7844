"""Checkpoints of others: written for their libraries, and compared with their models on the same input.

`convert` is the command; `writers` has a function for each target; `references` builds the models of torchvision, timm
and Hugging Face; `hugging_face` is the class that transformers' AutoModel finds. What is read is in `bevt_ds.model`
(containers, layouts, convert, weights), since every command starts from weights. Start reading at `convert`.
"""
