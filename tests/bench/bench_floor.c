/* The benchmark's floor in C: accept, answer 101, and the loop of send() that no server can do without.
 *
 * bench_fanout.py compiles and runs it, with the bytes of one poll in hexadecimal as its argument, and
 * talks to it as to the other sides: each line on stdin is answered with one of JSON. Linux only: epoll.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ANSWER                                                                                   \
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"           \
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
#define MOST_CLIENTS 1000000

static int sockets[MOST_CLIENTS]; /* the memory is touched, and counted, as they come */
static int clients;
static unsigned char *frames;
static size_t size;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* Only while it opens is a socket watched: what clients send later is pongs at the most. */
static void watch(int poller, int action, int sock)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = sock};
    if (epoll_ctl(poller, action, sock, &event))
        die("epoll");
}

static void upgrade(int poller, int sock)
{
    char request[4096];
    watch(poller, EPOLL_CTL_DEL, sock);
    if (recv(sock, request, sizeof request, 0) <= 0 || clients == MOST_CLIENTS) {
        close(sock);
        return;
    }
    if (send(sock, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) > 0)
        sockets[clients++] = sock;
}

static void obey(const char *line)
{
    struct timespec start;
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (!strcmp(line, "send\n"))
        for (int i = 0; i < clients; i++)
            send(sockets[i], frames, size, MSG_NOSIGNAL);
    printf("{\"start\": %ld.%09ld, \"clients\": %d, \"behind\": 0}\n", (long)start.tv_sec, start.tv_nsec, clients);
}

int main(int count, char **arguments)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event events[64];
    char line[100];
    int poller = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM, 0);
    if (count != 2 || !(frames = malloc(strlen(arguments[1]))))
        return 2;
    for (size = 0; sscanf(arguments[1] + 2 * size, "%2hhx", &frames[size]) == 1; size++)
        ;
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024))
        die("listen");
    getsockname(listener, (struct sockaddr *)&address, &(socklen_t){sizeof address});
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    setvbuf(stdin, NULL, _IONBF, 0); /* so that epoll sees every line */
    setvbuf(stdout, NULL, _IOLBF, 0);
    fflush(stdout);
    watch(poller, EPOLL_CTL_ADD, listener);
    watch(poller, EPOLL_CTL_ADD, 0);
    for (;;) {
        int ready = epoll_wait(poller, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            int sock = events[i].data.fd;
            if (sock == 0) {
                if (!fgets(line, sizeof line, stdin))
                    return 0;
                obey(line);
            } else if (sock == listener) {
                if ((sock = accept(listener, NULL, NULL)) < 0)
                    die("accept");
                setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
                watch(poller, EPOLL_CTL_ADD, sock);
            } else
                upgrade(poller, sock);
        }
    }
}
