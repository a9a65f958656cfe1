"""The machine that we run on: SaladCloud's metadata service, and whether the machine is fit for jobs."""
