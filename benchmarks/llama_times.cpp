// How long a GGUF file takes in the llama.cpp that this is compiled against, for llama_cpp.py:
//
//     llama_times MODEL LENGTH NUM_DECODED THREADS
//
// Reads LENGTH tokens, in the batches that llama.cpp takes by default, then writes NUM_DECODED more, one at a time. Prints
// the seconds of reading and of writing one token, by the clock and then those of the processor, of all threads. Which
// tokens they are makes no difference to the time. llama.cpp says on stderr how large its caches are.

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

static void decode(llama_context * context, int num_tokens) {
    static std::vector<llama_token> tokens;
    tokens.resize(num_tokens, 1);
    const int most = llama_n_batch(context);
    for (int start = 0; start < num_tokens; start += most) {
        if (llama_decode(context, llama_batch_get_one(tokens.data() + start, std::min(most, num_tokens - start))) != 0) {
            std::exit(5);
        }
    }
    llama_synchronize(context);
}

int main(int argc, char ** argv) {
    if (argc != 5) {
        return 2;
    }
    const int length = std::atoi(argv[2]), num_decoded = std::atoi(argv[3]), threads = std::atoi(argv[4]);

    ggml_backend_load_all();
    llama_model_params loading = llama_model_default_params();
    loading.use_extra_bufts = false;  // Without AMX: virtual machines may announce it and not run it.
    llama_model * model = llama_model_load_from_file(argv[1], loading);
    if (!model) {
        return 3;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = length + num_decoded;
    params.n_threads = params.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return 4;
    }

    decode(context, std::min<int>(length, llama_n_ubatch(context)));
    decode(context, 1);
    llama_memory_clear(llama_get_memory(context), true);

    const std::clock_t start_cpu = std::clock();
    const int64_t start = llama_time_us();
    decode(context, length);
    const int64_t read = llama_time_us();
    const std::clock_t read_cpu = std::clock();
    for (int token = 0; token < num_decoded; ++token) {
        decode(context, 1);
    }
    const int64_t written = llama_time_us();
    const std::clock_t written_cpu = std::clock();
    std::printf("%.9f %.9f ", (read - start) / 1e6, (written - read) / 1e6 / num_decoded);
    const double a_second = CLOCKS_PER_SEC;
    std::printf("%.9f %.9f\n", (read_cpu - start_cpu) / a_second, (written_cpu - read_cpu) / a_second / num_decoded);
    return 0;
}
