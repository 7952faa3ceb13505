// Running a grid on one core: blocks one after another, a fibre for every thread that waits.
//
// A thread runs until it waits at a barrier or for the other lanes of a collective, or returns; then the next one runs:
// lanes of its warp first, other warps when none of them can.  SIMULATION_ORDER says which is next: "forward" (the
// lowest), "reverse" (the highest, and blocks from the last one) or "shuffle" (any, by SIMULATION_SEED).  A kernel
// without a race gives the same in every order.
//
// A thread that has not started yet needs no stack of its own when the one before it has returned: kernels that never
// wait are a loop.

#include "fibres.h"
#include "run.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <numeric>
#include <string>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <vector>

using simulation::Fault;
using simulation::Kernel;

uint3 simulation_thread;
simulation::Launch simulation_launch;

// simulation_switch(&left, stack) leaves one stack for another; both keep the callee's registers on top.
extern "C" void simulation_switch(void **left, void *stack);
extern "C" void simulation_resume();
extern "C" void simulation_begin();
asm(R"(
    .text
    .type simulation_switch, @function
simulation_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
simulation_resume:
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .type simulation_begin, @function
simulation_begin:
    call simulation_fibre
    ud2
)");

namespace {

constexpr int WARP = 32, MOST = 1024;
constexpr size_t STACK = 256 << 10, PAGE = 4096;
constexpr size_t DYNAMIC = 1 << 20; // the most shared memory that a launch may ask for

struct Copy {
    void *to;
    const void *from;
    unsigned bytes, given, group;
};

struct Thread {
    uint3 index;
    void *stack; // where it is left, once it has started
    int number;  // of its stack
    enum { NEW, READY, BARRIER, COLLECTIVE, DONE } state;
    // What it waits for.
    const char *name, *file;
    int line, barrier;
    unsigned mask;
    std::vector<Copy> copies;
    unsigned group;
};

struct Meeting { // of the lanes of a mask, kept at its lowest lane
    unsigned mask, here;
    void (*run)(void **, unsigned);
    int line;
};

struct Warp {
    unsigned exists, ready, done;
    Meeting meetings[WARP];
    void *operands[WARP];
};

struct Barrier {
    unsigned count, here, sum, all;
    int result, line;
    const char *file;
};

Thread threads[MOST];
Warp warps[MOST / WARP];
Barrier barriers[16];
unsigned ready_warps, total, done;
int current; // the running thread
std::vector<int> free_stacks;
char *stacks, *dynamic;
void *host; // the stack that launched
const Kernel *kernel;
const void *arguments;
void (*task)(void *); // instead of a kernel: one function, guarded like one
void *task_data;
Fault fault;
enum { FORWARD, REVERSE, SHUFFLE } order;
uint64_t state;

unsigned random_below(unsigned n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return unsigned((state >> 32) * n >> 32);
}

int choose(unsigned set) {
    if (order == FORWARD) return __builtin_ctz(set);
    if (order == REVERSE) return 31 - __builtin_clz(set);
    for (unsigned skip = random_below(unsigned(__builtin_popcount(set))); skip; skip--) set &= set - 1;
    return __builtin_ctz(set);
}

void set_ready(int warp, unsigned lanes) {
    warps[warp].ready |= lanes;
    ready_warps |= 1u << warp;
}

void set_waiting(int t) {
    Warp &warp = warps[t / WARP];
    warp.ready &= ~(1u << t % WARP);
    if (!warp.ready) ready_warps &= ~(1u << t / WARP);
}

std::string triple(uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string place(const char *file, int line) {
    const char *slash = strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

std::string where() {
    if (!kernel) return "library call";
    return std::string(kernel->name) + ": block " + triple(simulation_launch.block) + ", thread " +
           triple(simulation_thread);
}

[[noreturn]] void leave() {
    void *unused;
    simulation_switch(&unused, host);
    __builtin_unreachable();
}

[[noreturn]] void fail(int code, const std::string &what) {
    fault.code = code;
    fault.message = where() + ": " + what;
    leave();
}

void *stack_top(int number) {
    // Tops at different distances from their page, lest all frames fall into the same lines of the cache.
    return stacks + (size_t(number) + 1) * STACK - 64 - size_t(number) % 61 * 320;
}

void *fresh_stack(int number) {
    void **top = static_cast<void **>(stack_top(number));
    top = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--top = nullptr, *--top = nullptr; // a call in simulation_begin must find it aligned to 16
    *--top = reinterpret_cast<void *>(&simulation_begin);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    return top;
}

std::string waits(const Thread &t) {
    if (t.state == Thread::DONE) return "has returned";
    return std::string("is at ") + t.name + ", " + place(t.file, t.line);
}

// Nobody can go on: says who waits for whom.
[[noreturn]] void stalled() {
    for (unsigned i = 0; i < total; i++) {
        Thread &t = threads[i];
        if (t.state != Thread::COLLECTIVE && t.state != Thread::BARRIER) continue;
        simulation_thread = t.index;
        for (unsigned j = 0; j < total; j++) {
            Thread &other = threads[j];
            bool missing = t.state == Thread::BARRIER ? other.state != Thread::BARRIER || other.barrier != t.barrier
                                                      : j / WARP == i / WARP && (t.mask >> j % WARP & 1) &&
                                                            (other.state != Thread::COLLECTIVE ||
                                                             other.mask != t.mask || other.line != t.line);
            if (missing)
                fail(simulation::LAUNCH_FAILED, "waits at " + std::string(t.name) + ", " + place(t.file, t.line) +
                                                    ", for thread " + triple(other.index) + ", which " + waits(other));
        }
        if (t.state == Thread::COLLECTIVE)
            fail(simulation::LAUNCH_FAILED, "names lanes in " + std::string(t.name) + ", " + place(t.file, t.line) +
                                                ", that the block does not have");
        fail(simulation::LAUNCH_FAILED, "waits for ever at " + std::string(t.name) + ", " + place(t.file, t.line));
    }
    abort();
}

// The next thread to run, with what shows its state to kernels; -1 when the block is finished.
int next() {
    if (!ready_warps) {
        if (done == total) return -1;
        stalled();
    }
    int warp = current >= 0 && order != SHUFFLE && warps[current / WARP].ready ? current / WARP : choose(ready_warps);
    return warp * WARP + choose(warps[warp].ready);
}

void enter(int t) {
    current = t;
    simulation_thread = threads[t].index;
}

// Leaves the running thread, which waits, for the next.
void yield() {
    Thread &left = threads[current];
    int t = next(); // not -1: this one has not returned
    Thread &thread = threads[t];
    if (&thread == &left) return;
    enter(t);
    if (thread.state == Thread::NEW) {
        thread.state = Thread::READY;
        thread.number = free_stacks.back();
        free_stacks.pop_back();
        thread.stack = fresh_stack(thread.number);
    }
    simulation_switch(&left.stack, thread.stack);
}

} // namespace

extern "C" __attribute__((used)) void simulation_fibre() {
    if (task) {
        task(task_data);
        leave();
    }
    for (;;) {
        kernel->call(arguments);
        Thread &left = threads[current];
        left.state = Thread::DONE;
        done++;
        warps[current / WARP].done |= 1u << current % WARP;
        set_waiting(current);
        int t = next();
        if (t < 0) leave();
        Thread &thread = threads[t];
        enter(t);
        if (thread.state == Thread::NEW) { // on the stack that has become free
            thread.state = Thread::READY;
            thread.number = left.number;
            continue;
        }
        free_stacks.push_back(left.number);
        void *unused;
        simulation_switch(&unused, thread.stack);
    }
}

int simulation_barrier(int id, unsigned count, int vote, int predicate, const char *name, const char *file, int line) {
    Thread &thread = threads[current];
    Barrier &barrier = barriers[id];
    if (!count) count = total;
    if (!barrier.here)
        barrier.count = count, barrier.sum = 0, barrier.all = 1, barrier.line = line, barrier.file = file;
    else if (barrier.count != count || (count == total && (barrier.line != line || strcmp(barrier.file, file))))
        fail(simulation::LAUNCH_FAILED, std::string("is at ") + name + ", " + place(file, line) +
                                            ", while others wait at " + place(barrier.file, barrier.line));
    barrier.sum += predicate != 0;
    barrier.all &= predicate != 0;
    if (++barrier.here == count) {
        barrier.here = 0;
        barrier.result = vote == simulation::OR      ? barrier.sum != 0
                         : vote == simulation::AND   ? int(barrier.all)
                         : vote == simulation::COUNT ? int(barrier.sum)
                                                     : 0;
        for (unsigned i = 0; i < total; i++)
            if (threads[i].state == Thread::BARRIER && threads[i].barrier == id) {
                threads[i].state = Thread::READY;
                set_ready(int(i) / WARP, 1u << i % WARP);
            }
        if (order == FORWARD) return barrier.result;
        int result = barrier.result; // in the other orders the last to come is not the first to go on
        yield();
        return result;
    }
    thread.state = Thread::BARRIER;
    thread.name = name, thread.file = file, thread.line = line, thread.barrier = id;
    set_waiting(current);
    yield();
    return barrier.result;
}

void simulation_collective(unsigned mask, void *operand, void (*run)(void **, unsigned), const char *name,
                           const char *file, int line) {
    int lane = current % WARP;
    Warp &warp = warps[current / WARP];
    unsigned bit = 1u << lane;
    if (!(mask & bit))
        fail(simulation::LAUNCH_FAILED,
             std::string("is not in the mask of its own ") + name + ", " + place(file, line));
    Meeting &meeting = warp.meetings[__builtin_ctz(mask)];
    if (!meeting.here)
        meeting.mask = mask, meeting.run = run, meeting.line = line;
    else if (meeting.mask != mask || meeting.run != run || meeting.line != line)
        fail(simulation::LAUNCH_FAILED, std::string("is at ") + name + ", " + place(file, line) +
                                            ", while other lanes of its warp wait at line " +
                                            std::to_string(meeting.line) + ", or with another mask");
    meeting.here |= bit;
    warp.operands[lane] = operand;
    if (meeting.here == mask) {
        meeting.here = 0;
        void *operands[WARP];
        for (int i = 0; i < WARP; i++) operands[i] = mask >> i & 1 ? warp.operands[i] : nullptr;
        run(operands, mask);
        for (unsigned rest = mask & ~bit; rest; rest &= rest - 1)
            threads[current / WARP * WARP + __builtin_ctz(rest)].state = Thread::READY;
        if (mask & ~bit) set_ready(current / WARP, mask & ~bit);
        return;
    }
    Thread &thread = threads[current];
    thread.state = Thread::COLLECTIVE;
    thread.name = name, thread.file = file, thread.line = line, thread.mask = mask;
    set_waiting(current);
    yield();
}

void simulation_copy_async(void *to, const void *from, unsigned bytes, unsigned given) {
    Thread &thread = threads[current];
    memset(to, 0xff, bytes);
    thread.copies.push_back({to, from, bytes, given, thread.group});
}

void simulation_copy_commit() { threads[current].group++; }

void simulation_copy_wait(unsigned groups) {
    Thread &thread = threads[current];
    size_t kept = 0;
    for (Copy &copy : thread.copies) {
        if (copy.group + groups >= thread.group) {
            thread.copies[kept++] = copy;
            continue;
        }
        memcpy(copy.to, copy.from, copy.given);
        memset(static_cast<char *>(copy.to) + copy.given, 0, copy.bytes - copy.given);
    }
    thread.copies.resize(kept);
}

unsigned simulation_lane() { return unsigned(current % WARP); }

unsigned simulation_active() {
    Warp &warp = warps[current / WARP];
    return warp.exists & ~warp.done;
}

void simulation_fail(const char *what, const char *file, int line) {
    fail(simulation::LAUNCH_FAILED, std::string(what) + ", " + place(file, line));
}

// ---- faults ------------------------------------------------------------------------------------------

namespace {

// A touch of forbidden memory: on with the stack that launched, which finds the fault.
void on_signal(int number, siginfo_t *info, void *context) {
    auto &registers = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
    char text[96];
    if (number == SIGVTALRM) {
        auto stack = reinterpret_cast<char *>(registers[REG_RSP]);
        if (stack < stacks || stack >= stacks + STACK * MOST) return; // between two blocks
        fault.code = simulation::LAUNCH_TIMEOUT;
        snprintf(text, sizeof text, "runs for ever, or longer than SIMULATION_TIMEOUT");
    } else if (number == SIGILL || (number == SIGSEGV && info->si_code == SI_KERNEL)) {
        fault.code = simulation::MISALIGNED_ADDRESS;
        snprintf(text, sizeof text, "misaligned access");
    } else if (number == SIGFPE) {
        fault.code = simulation::LAUNCH_FAILED;
        snprintf(text, sizeof text, "integer division by zero");
    } else {
        bool in_stack = info->si_addr >= stacks && info->si_addr < stacks + STACK * MOST;
        fault.code = simulation::ILLEGAL_ADDRESS;
        snprintf(text, sizeof text, in_stack ? "stack overflow" : "illegal %s of address %p",
                 registers[REG_ERR] & 2 ? "write" : "read", info->si_addr);
    }
    fault.message = where() + ": " + text;
    Dl_info symbol;
    if (dladdr(reinterpret_cast<void *>(registers[REG_RIP]), &symbol) && symbol.dli_sname)
        fault.message += std::string(" in ") + symbol.dli_sname;
    registers[REG_RSP] = reinterpret_cast<greg_t>(host);
    registers[REG_RIP] = reinterpret_cast<greg_t>(&simulation_resume);
}

void *map(size_t bytes) {
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("simulation: mmap");
        abort();
    }
    return memory;
}

void prepare() {
    if (!stacks) {
        stacks = static_cast<char *>(map(STACK * MOST));
        for (int i = 0; i < MOST; i++) mprotect(stacks + size_t(i) * STACK, PAGE, PROT_NONE);
        dynamic = static_cast<char *>(map(DYNAMIC + 2 * PAGE)) + PAGE;
        mprotect(dynamic - PAGE, PAGE, PROT_NONE);
        mprotect(dynamic + DYNAMIC, PAGE, PROT_NONE);
    }
    static thread_local char *signals;
    if (!signals) {
        signals = static_cast<char *>(map(64 << 10));
        stack_t alternative = {};
        alternative.ss_sp = signals, alternative.ss_size = 64 << 10;
        sigaltstack(&alternative, nullptr);
    }
}

constexpr int SIGNALS[] = {SIGVTALRM, SIGSEGV, SIGBUS, SIGILL, SIGFPE}, ALWAYS = 1, ALL = 5;

// Seconds of this process until a kernel counts as endless; 0 stops the clock.
void set_clock(long seconds) {
    itimerval clock = {{1, 0}, {seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &clock, nullptr);
}

// Switches to the first fibre until all is done or something failed.
void guarded(bool (*go)()) {
    static const bool sanitized = getenv("SIMULATION_SANITIZE") && *getenv("SIMULATION_SANITIZE") == '1';
    static const char *const limit = getenv("SIMULATION_TIMEOUT");
    static const long seconds = limit && *limit ? atol(limit) : 300;
    const int handled = sanitized ? ALWAYS : ALL; // the sanitizer's own report is better
    struct sigaction mine = {}, before[ALL];
    mine.sa_sigaction = on_signal;
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < handled; i++) sigaction(SIGNALS[i], &mine, &before[i]);
    set_clock(seconds);
    while (fault.code == 0 && go());
    set_clock(0);
    for (int i = 0; i < handled; i++) sigaction(SIGNALS[i], &before[i], nullptr);
}

void start() {
    free_stacks.clear();
    for (int i = MOST - 1; i > 0; i--) free_stacks.push_back(i);
    void *first = fresh_stack(0);
    simulation_switch(&host, first);
}

// Written in a way that no sanitizer intercepts: redzones lie between the variables.
void poison(char *begin, char *end) {
    size_t bytes = size_t(end - begin);
    asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(0xff) : "memory");
}

simulation::Range shared;
uint64_t next_block, blocks;
uint64_t stride, offset; // of blocks in SHUFFLE: a permutation

bool run_block() {
    if (next_block == blocks) return false;
    simulation::Launch &launch = simulation_launch;
    uint64_t b = order == REVERSE ? blocks - 1 - next_block : next_block;
    if (order == SHUFFLE) b = (b * stride + offset) % blocks;
    next_block++;
    launch.block.x = unsigned(b % launch.grid_dim.x);
    launch.block.y = unsigned(b / launch.grid_dim.x % launch.grid_dim.y);
    launch.block.z = unsigned(b / launch.grid_dim.x / launch.grid_dim.y);
    poison(shared.begin, shared.end);
    poison(launch.dynamic, launch.dynamic + launch.dynamic_bytes);
    for (unsigned i = 0; i < total; i++) {
        threads[i].state = Thread::NEW;
        if (!threads[i].copies.empty()) threads[i].copies.clear();
        threads[i].group = 0;
    }
    unsigned count = (total + WARP - 1) / WARP;
    for (unsigned w = 0; w < count; w++) {
        unsigned lanes = total - w * WARP;
        warps[w].exists = warps[w].ready = lanes >= WARP ? ~0u : (1u << lanes) - 1;
        warps[w].done = 0;
        for (Meeting &meeting : warps[w].meetings) meeting.here = 0;
    }
    ready_warps = count == WARP ? ~0u : (1u << count) - 1;
    for (Barrier &barrier : barriers) barrier.here = 0;
    done = 0;
    current = -1;
    int t = next();
    enter(t);
    threads[t].state = Thread::READY;
    threads[t].number = 0;
    start();
    return true;
}

} // namespace

Fault simulation::run(const Kernel &k, Range statics, uint3 grid, uint3 block, size_t dynamic_bytes,
                      const void *buffer) {
    prepare();
    const char *wanted = getenv("SIMULATION_ORDER"), *seed = getenv("SIMULATION_SEED");
    order = !wanted || !*wanted || !strcmp(wanted, "forward") ? FORWARD
            : !strcmp(wanted, "reverse")                      ? REVERSE
                                                              : SHUFFLE;
    state = 0x9e3779b97f4a7c15u * ((seed ? strtoull(seed, nullptr, 10) : 0) + 1);
    fault = {};
    kernel = &k, arguments = buffer, shared = statics, task = nullptr;
    total = block.x * block.y * block.z;
    size_t padded = (dynamic_bytes + 15) / 16 * 16;
    simulation_launch = {{0, 0, 0}, block, grid, dynamic + DYNAMIC - padded, padded};
    for (unsigned i = 0; i < total; i++) threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    next_block = 0, blocks = uint64_t(grid.x) * grid.y * grid.z;
    do stride = 1 + random_below(unsigned(std::min<uint64_t>(blocks, 1u << 31)));
    while (std::gcd(stride, blocks) != 1);
    offset = stride / 2;
    guarded(run_block);
    kernel = nullptr;
    return fault;
}

Fault simulation::run(void (*function)(void *), void *data) {
    prepare();
    fault = {};
    kernel = nullptr, task = function, task_data = data;
    static bool once;
    once = true;
    guarded([] {
        if (!once) return false;
        once = false;
        start();
        return true;
    });
    task = nullptr;
    return fault;
}
