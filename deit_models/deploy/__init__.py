"""Making a model fast where it runs (`optimize`), taking it elsewhere (`export`), measuring the machine (`bench`)."""
