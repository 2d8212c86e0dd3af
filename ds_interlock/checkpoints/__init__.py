"""What a checkpoint on disk is: its folder and files, and its optimizer state by the names of parameters."""
