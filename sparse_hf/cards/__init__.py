"""What is in a folder, told to people: what is sparse in it, as data, as a picture, as a model card."""
