"""The one seam to `TransformerBridge`: its sites, its runs, what writers add and readers get."""
