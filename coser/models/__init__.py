"""The networks: the multi-view UNet and its mixers, the autoencoder of views, the text encoder."""
