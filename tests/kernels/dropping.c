/* bn_drop_file_pages takes pages of a mapped file from the process, and nothing that would be lost.
 * Argument: a file of 64 pages.  Prints what went wrong. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ops/load.h"

enum { PAGES = 64 };

static size_t page;

static int pages_there(const unsigned char *memory)
{
    unsigned long long entry;
    const int pagemap = open("/proc/self/pagemap", O_RDONLY);
    int count = 0;
    for (size_t i = 0; i < PAGES; i++) {
        const off_t at = (off_t)(((size_t)memory / page + i) * sizeof entry);
        count += pread(pagemap, &entry, sizeof entry, at) == (ssize_t)sizeof entry && entry >> 63;
    }
    close(pagemap);
    return count;
}

static unsigned sum(const unsigned char *memory)
{
    unsigned total = 0;
    for (size_t i = 0; i < PAGES * page; i++) {
        total = total * 31 + memory[i];
    }
    return total;
}

static void expect(int good, const char *what)
{
    if (!good) {
        puts(what);
    }
}

int main(int argc, char **argv)
{
    page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t bytes = PAGES * page;
    const int file = argc == 2 ? open(argv[1], O_RDONLY) : -1;
    unsigned char *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    unsigned char *heap = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || heap == MAP_FAILED) {
        return 2;
    }
    const unsigned whole = sum(mapped);
    memcpy(heap, mapped, bytes);

    bn_drop_file_pages(heap, bytes);
    expect(sum(heap) == whole, "memory of the process alone was lost");
    bn_drop_file_pages(mapped + 1, page);
    expect(pages_there(mapped) == PAGES, "a page was dropped that is not whole in the range");
    bn_drop_file_pages(mapped + 1, 2 * page - 1);
    expect(pages_there(mapped) < PAGES, "the only whole page in the range was not dropped");
    bn_drop_file_pages(mapped, bytes);
    expect(pages_there(mapped) == 0, "pages of the file were not dropped");
    expect(sum(mapped) == whole, "pages of the file came back different");
    mapped[5 * page]++;
    bn_drop_file_pages(mapped, bytes);
    expect(pages_there(mapped) == PAGES, "pages were dropped although one was written to");
    mapped[5 * page]--;
    expect(sum(mapped) == whole, "a written page was lost");
    return 0;
}
