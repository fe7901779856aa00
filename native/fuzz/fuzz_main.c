/* SPDX-License-Identifier: Apache-2.0 */
/* Feed files, or all files of directories, to a fuzz target: its corpus as a test for any compiler. */
#include "cleanup.h"
#include "io.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int feed_file(int directory, const char *name)
{
        struct bs_error error;
        uint64_t size;
        int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);

        if (fd < 0 || bs_fd_size(fd, &error, &size) < 0) {
                perror(name);
                exit(1);
        }

        _cleanup_free_ uint8_t *data = bs_alloc_zeroed((size_t)size);

        if (!data || bs_pread_all(fd, data, (size_t)size, 0) < 0) {
                perror(name);
                exit(1);
        }
        close(fd);
        LLVMFuzzerTestOneInput(data, (size_t)size);
        return 1;
}

static int feed(const char *path)
{
        struct dirent *entry;
        int fed = 0;
        DIR *directory = opendir(path);

        if (!directory)
                return feed_file(AT_FDCWD, path);
        while ((entry = readdir(directory))) {
                if (entry->d_name[0] != '.')
                        fed += feed_file(dirfd(directory), entry->d_name);
        }
        closedir(directory);
        return fed;
}

int main(int argc, char **argv)
{
        int fed = 0;

        for (int i = 1; i < argc; i++)
                fed += feed(argv[i]);
        printf("%d inputs\n", fed);
        return fed ? 0 : 1;
}
