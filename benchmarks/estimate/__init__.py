"""What a fine-tune costs on the price rows of several clouds: arithmetic, assumptions, tables and a picture."""
