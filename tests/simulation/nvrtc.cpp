// A libnvrtc that compiles for the host: g++ with simulation.h in front of the source, ptx.cuh's twin in place of
// ptx.cuh.  Its "cubin" is a shared object that exports a table of the kernels (fibres.h: Kernel).  Compiled objects
// are kept in SIMULATION_CACHE under a hash of the preprocessed source and the options.
//
// The log has the form of nvrtc's own: `file(line): error: message`.

#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <set>
#include <spawn.h>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#ifndef SIMULATION_FOLDER
#error "SIMULATION_FOLDER is where simulation.h lies"
#endif

#define API extern "C" __attribute__((visibility("default")))

extern char **environ;

namespace {

using std::string;

enum { SUCCESS, OUT_OF_MEMORY, CREATION_FAILURE, INVALID_INPUT, INVALID_PROGRAM, INVALID_OPTION, COMPILATION };

struct Program {
    string name, source, log, object;
    int architecture = 75;
    std::vector<std::pair<string, string>> headers;
};

string read(const string &path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

void write(const string &path, const string &text) { std::ofstream(path, std::ios::binary) << text; }

string environment(const char *name, const string &otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

std::vector<string> split(const string &text) {
    std::stringstream stream(text);
    std::vector<string> words;
    for (string word; stream >> word;) words.push_back(word);
    return words;
}

uint64_t hash(const string &text, uint64_t h) {
    for (unsigned char c : text) h = (h ^ c) * 0x100000001b3u, h ^= h >> 29;
    return h;
}

// Runs g++ with its messages in `log`; whether it succeeded.
bool compiler(std::vector<string> words, const string &log) {
    words.insert(words.begin(), environment("SIMULATION_CXX", "g++"));
    std::vector<char *> argv;
    for (string &word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    std::vector<char *> kept; // a sanitizer's library in this process is not meant for the compiler
    for (char **variable = environ; *variable; variable++)
        if (strncmp(*variable, "LD_PRELOAD=", 11) && strncmp(*variable, "LC_ALL=", 7) && strncmp(*variable, "LANG=", 5))
            kept.push_back(*variable);
    static char locale[] = "LC_ALL=C";
    kept.push_back(locale);
    kept.push_back(nullptr);
    pid_t child;
    int status = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), kept.data());
    posix_spawn_file_actions_destroy(&actions);
    if (status) {
        write(log, words[0] + ": " + strerror(status) + "\n");
        return false;
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// "file:line:column: error: what" as "file(line): error: what", and the folder of headers taken off names.
string messages(const string &text, const string &folder) {
    std::stringstream lines(text);
    string line, result;
    while (std::getline(lines, line)) {
        for (size_t at; (at = line.find(folder + "/")) != string::npos;) line.erase(at, folder.size() + 1);
        for (const char *kind : {": error: ", ": fatal error: ", ": warning: "}) {
            size_t at = line.find(kind), column, number;
            if (at == string::npos || (column = line.rfind(':', at - 1)) == string::npos ||
                (number = line.rfind(':', column - 1)) == string::npos)
                continue;
            line = line.substr(0, number) + "(" + line.substr(number + 1, column - number - 1) + ")" + line.substr(at);
            break;
        }
        result += line + "\n";
    }
    return result;
}

struct Found {
    string name, bound;
};

size_t after_parentheses(const string &text, size_t at) { // text[at] is "("
    int depth = 0;
    for (; at < text.size(); at++) {
        depth += text[at] == '(' ? 1 : text[at] == ')' ? -1 : 0;
        if (!depth) return at + 1;
    }
    return at;
}

bool word(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// The kernels declared in preprocessed text, with their launch bounds.
std::vector<Found> kernels(const string &text) {
    const string mark = "__attribute__((simulation_kernel))", bounds = "simulation_bounds(";
    std::vector<Found> found;
    std::set<string> names;
    for (size_t at = text.find(mark); at != string::npos; at = text.find(mark, at + 1)) {
        size_t begin = text.find_last_of(";{}", at);
        begin = begin == string::npos ? 0 : begin;
        if (text.find("extern \"C\"", begin) > at) continue;
        Found kernel;
        kernel.bound = "0";
        size_t i = at + mark.size();
        while (i < text.size()) {
            if (text[i] == '#' && text[i - 1] == '\n') { // a line marker
                i = text.find('\n', i);
            } else if (!word(text[i])) {
                i++;
            } else {
                size_t end = i;
                while (end < text.size() && word(text[end])) end++;
                string name = text.substr(i, end - i);
                size_t next = text.find_first_not_of(" \t\r\n", end);
                if (name == "__attribute__") {
                    i = after_parentheses(text, next);
                    string attribute = text.substr(next, i - next);
                    size_t open = attribute.find(bounds);
                    if (open != string::npos) {
                        open += bounds.size() - 1;
                        size_t close = after_parentheses(attribute, open) - 1;
                        int depth = 0;
                        for (size_t c = open + 1; c < close; c++) {
                            depth += attribute[c] == '(' ? 1 : attribute[c] == ')' ? -1 : 0;
                            if (attribute[c] == ',' && !depth) close = c;
                        }
                        kernel.bound = attribute.substr(open + 1, close - open - 1);
                    }
                } else if (next != string::npos && text[next] == '(') {
                    kernel.name = name;
                    break;
                } else {
                    i = end;
                }
            }
        }
        if (!kernel.name.empty() && names.insert(kernel.name).second) found.push_back(kernel);
    }
    return found;
}

string table(const std::vector<Found> &found, int architecture) {
    string text = "\n# 1 \"kernels\"\n"
                  "extern \"C\" char __start_simulation_shared[] __attribute__((weak, visibility(\"hidden\")));\n"
                  "extern \"C\" char __stop_simulation_shared[] __attribute__((weak, visibility(\"hidden\")));\n"
                  "extern \"C\" __attribute__((visibility(\"default\"))) const simulation::Range simulation_statics = "
                  "{__start_simulation_shared, __stop_simulation_shared};\n"
                  "extern \"C\" __attribute__((visibility(\"default\"))) const int simulation_architecture = " +
                  std::to_string(architecture) +
                  ";\n"
                  "extern \"C\" __attribute__((visibility(\"default\"))) const simulation::Kernel simulation_kernels[] "
                  "= {\n";
    for (const Found &kernel : found)
        text += "simulation::describe<&" + kernel.name + ">(\"" + kernel.name + "\", unsigned(" + kernel.bound + "), " +
                kernel.name + "),\n";
    return text + "{}};\n";
}

// What g++ is given of nvrtc's options; false for one that nvrtc does not know either.
bool translate(const std::vector<string> &options, std::vector<string> &words, Program &program) {
    for (size_t i = 0; i < options.size(); i++) {
        string option = options[i], value;
        size_t equal = option.find('=');
        if (option.rfind("--", 0) == 0 && equal != string::npos) {
            value = option.substr(equal + 1);
            option = option.substr(0, equal);
        }
        auto next = [&] { return value.empty() && i + 1 < options.size() ? options[++i] : value; };
        static const std::set<string> ignored = {"--use_fast_math",
                                                 "-use_fast_math",
                                                 "--std",
                                                 "-std",
                                                 "--device-debug",
                                                 "-G",
                                                 "--generate-line-info",
                                                 "-lineinfo",
                                                 "--restrict",
                                                 "-restrict",
                                                 "--extra-device-vectorization",
                                                 "--default-device",
                                                 "-default-device",
                                                 "--device-as-default-execution-space",
                                                 "--fmad",
                                                 "--ftz",
                                                 "--prec-div",
                                                 "--prec-sqrt",
                                                 "--maxrregcount",
                                                 "--diag-suppress",
                                                 "--disable-warnings",
                                                 "-w",
                                                 "--minimal",
                                                 "-minimal",
                                                 "--split-compile",
                                                 "--no-cache",
                                                 "--ptxas-options",
                                                 "--builtin-initializer-list",
                                                 "--dopt"};
        if (option == "--gpu-architecture" || option.rfind("-arch", 0) == 0) {
            if (option.rfind("-arch=", 0) == 0) value = option.substr(6);
            string architecture = next();
            size_t at = architecture.find('_');
            int number = at == string::npos ? 0 : atoi(architecture.c_str() + at + 1);
            if (number < 50) {
                program.log += "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
                return false;
            }
            program.architecture = number;
        } else if (option == "--define-macro" || option == "-D") {
            words.push_back("-D" + next());
        } else if (option == "--include-path" || option == "-I") {
            next(); // nothing of CUDA's own headers
        } else if (option == "-Xptxas" || option == "--undefine-macro") {
            next();
        } else if (option.rfind("-D", 0) == 0) {
            words.push_back(option);
        } else if (option.rfind("-I", 0) != 0 && option.rfind("-std=", 0) != 0 && !ignored.count(option)) {
            program.log += "nvrtc: error: unrecognized option " + options[i] + " found\n";
            return false;
        }
    }
    return true;
}

int compile(Program &program, const std::vector<string> &options) {
    program.log.clear();
    // Local variables that a kernel reads before it writes them hold a pattern; large frames do not jump over the
    // forbidden page of their stack.
    std::vector<string> words = split("-std=c++17 -x c++ -O2 -fPIC -fno-gnu-unique -fvisibility=hidden "
                                      "-fno-strict-aliasing -ffp-contract=fast -fstack-clash-protection -w "
                                      "-fno-diagnostics-show-caret -fno-diagnostics-show-option");
    if (__GNUC__ >= 12) words.push_back("-ftrivial-auto-var-init=pattern");
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) words.insert(words.end(), {"-mavx2", "-mfma"});
    if (environment("SIMULATION_SANITIZE", "0") == "1")
        words.insert(words.end(), {"-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize=vptr",
                                   "-fno-sanitize-recover=undefined", "-fsanitize-sections=simulation_shared"});
    else // misaligned loads are faults on a GPU; the trap is caught (fibres.cpp)
        words.insert(words.end(), {"-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"});
    if (!translate(options, words, program)) return INVALID_OPTION;
    words.push_back("-D__CUDA_ARCH__=" + std::to_string(program.architecture * 10));

    const string cache = environment("SIMULATION_CACHE", "/tmp");
    string folder = cache + "/nvrtc-XXXXXX";
    if (!mkdtemp(folder.data())) {
        program.log = "nvrtc: error: cannot write in " + cache + "\n";
        return COMPILATION;
    }
    auto place = [&](const string &name, const string &text) {
        for (size_t slash = name.find('/', 1); slash != string::npos; slash = name.find('/', slash + 1))
            mkdir((folder + "/" + name.substr(0, slash)).c_str(), 0700);
        write(folder + "/" + name, text);
    };
    for (auto &[name, text] : program.headers) {
        bool twin = name.substr(name.rfind('/') + 1) == "ptx.cuh";
        place(name, twin ? read(SIMULATION_FOLDER "/ptx.cuh") : "#line 1 \"" + name + "\"\n" + text);
    }
    const string main = folder + "/source.cu", flat = folder + "/source.ii", log = folder + "/log";
    write(main, "#line 1 \"" + program.name + "\"\n" + program.source);

    std::vector<string> first = words;
    first.insert(first.end(), {"-E", "-I", folder, "-I", SIMULATION_FOLDER, "-include",
                               SIMULATION_FOLDER "/simulation.h", main, "-o", flat});
    int result = COMPILATION;
    if (compiler(first, log)) {
        string text = read(flat);
        // The folder's name is another each time, and must not be part of the hash or of what is reported.
        for (size_t at = 0; (at = text.find(folder + "/", at)) != string::npos;) text.erase(at, folder.size() + 1);
        text += table(kernels(text), program.architecture);
        string all;
        for (const string &w : words) all += w + '\n';
        all += text;
        char name[64];
        snprintf(name, sizeof name, "/%016llx%016llx.so", (unsigned long long)hash(all, 0xcbf29ce484222325u),
                 (unsigned long long)hash(all, 0x9ae16a3b2f90404fu));
        const string object = cache + name;
        if (access(object.c_str(), R_OK) != 0) {
            write(flat, text);
            std::vector<string> second = words;
            second[2] = "c++-cpp-output"; // in place of c++
            const string made = folder + "/object.so";
            second.insert(second.end(), {"-shared", flat, "-o", made});
            if (compiler(second, log)) rename(made.c_str(), object.c_str());
        }
        if (access(object.c_str(), R_OK) == 0) {
            program.object = read(object);
            result = SUCCESS;
        }
    }
    program.log += messages(read(log), folder);
    for (auto &[name, text] : program.headers) unlink((folder + "/" + name).c_str());
    for (const string &path : {main, flat, log}) unlink(path.c_str());
    rmdir(folder.c_str());
    return result;
}

Program *of(void *handle) { return static_cast<Program *>(handle); }

} // namespace

API int nvrtcVersion(int *major, int *minor) {
    *major = 13, *minor = 0;
    return SUCCESS;
}

API const char *nvrtcGetErrorString(int code) {
    static const char *const names[] = {"NVRTC_SUCCESS",
                                        "NVRTC_ERROR_OUT_OF_MEMORY",
                                        "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
                                        "NVRTC_ERROR_INVALID_INPUT",
                                        "NVRTC_ERROR_INVALID_PROGRAM",
                                        "NVRTC_ERROR_INVALID_OPTION",
                                        "NVRTC_ERROR_COMPILATION"};
    return code >= 0 && code < 7 ? names[code] : "NVRTC_ERROR unknown";
}

API int nvrtcGetNumSupportedArchs(int *count) {
    *count = 8;
    return SUCCESS;
}

API int nvrtcGetSupportedArchs(int *architectures) {
    static const int known[8] = {75, 80, 86, 89, 90, 100, 103, 120};
    memcpy(architectures, known, sizeof known);
    return SUCCESS;
}

API int nvrtcCreateProgram(void **handle, const char *source, const char *name, int count, const char *const *headers,
                           const char *const *names) {
    if (!handle || !source || count < 0) return INVALID_INPUT;
    auto *program = new Program;
    program->name = name && *name ? name : "default_program";
    program->source = source;
    for (int i = 0; i < count; i++) program->headers.emplace_back(names[i], headers[i]);
    *handle = program;
    return SUCCESS;
}

API int nvrtcDestroyProgram(void **handle) {
    if (!handle || !*handle) return INVALID_PROGRAM;
    delete of(*handle);
    *handle = nullptr;
    return SUCCESS;
}

API int nvrtcCompileProgram(void *handle, int count, const char *const *options) {
    if (!handle) return INVALID_PROGRAM;
    return compile(*of(handle), std::vector<string>(options, options + count));
}

API int nvrtcGetCUBINSize(void *handle, size_t *size) {
    if (!handle) return INVALID_PROGRAM;
    *size = of(handle)->object.size();
    return SUCCESS;
}

API int nvrtcGetCUBIN(void *handle, char *cubin) {
    if (!handle) return INVALID_PROGRAM;
    memcpy(cubin, of(handle)->object.data(), of(handle)->object.size());
    return SUCCESS;
}

API int nvrtcGetProgramLogSize(void *handle, size_t *size) {
    if (!handle) return INVALID_PROGRAM;
    *size = of(handle)->log.size() + 1;
    return SUCCESS;
}

API int nvrtcGetProgramLog(void *handle, char *log) {
    if (!handle) return INVALID_PROGRAM;
    memcpy(log, of(handle)->log.c_str(), of(handle)->log.size() + 1);
    return SUCCESS;
}
