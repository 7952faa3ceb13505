/* Which kernel tables were built, and which of them this CPU can run. */
#ifndef LLMC_DISPATCH_H
#define LLMC_DISPATCH_H

#include "kernels.h"

typedef struct IsaEntry {
    const Kernels *kernels;
    int supported; /* by this CPU and its operating system */
} IsaEntry;

/* All tables built in; *count receives their number.  The last that is supported is the one to use. */
const IsaEntry *dispatch_table(int *count);

/* Ask the system for what a table needs before it is used; 0 where it refuses. */
int dispatch_claim(const Kernels *kernels);

#endif
