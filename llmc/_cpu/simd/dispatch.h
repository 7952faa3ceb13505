/* Which kernel tables were built, and which of them this CPU can run. */
#ifndef LLMC_DISPATCH_H
#define LLMC_DISPATCH_H

#include "kernels.h"

typedef struct IsaEntry {
    const Kernels *kernels;
    int supported; /* by this CPU and its operating system */
} IsaEntry;

/* All tables built in, slowest first; *count receives their number. */
const IsaEntry *dispatch_table(int *count);

#endif
