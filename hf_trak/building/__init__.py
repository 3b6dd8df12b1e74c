"""How an index comes to be: pass by pass of gradients, by one process, several, or an array of jobs."""
